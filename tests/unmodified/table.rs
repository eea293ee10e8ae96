//! The table of tested servers in README.md and docs/servers.md: of those that are here, with numbers of a real run.

use std::fs;
use std::path::{Path, PathBuf};

use crate::matrix::{Outcome, Server};
use crate::servers::SERVERS;

const BEGIN: &str = "<!-- servers:begin -->\n";
const END: &str = "<!-- servers:end -->";

const HEAD: &str = "\
| server | `zddsup run …` | one request a connection | on kept connections | failed |
|---|---|---|---|---|
";

/// Set to 1: the table is written anew from the newest results.
const WRITE: &str = "ZDDSUP_WRITE_TABLE";

fn pages() -> [PathBuf; 2] {
    ["README.md", "docs/servers.md"].map(|page| Path::new(env!("CARGO_MANIFEST_DIR")).join(page))
}

#[test]
fn has_these_servers_and_nothing_failed() {
    if std::env::var_os(WRITE).is_some_and(|value| value == "1") {
        write();
    }
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        let (_, rest) = text.split_once(BEGIN).unwrap();
        let (table, _) = rest.split_once(END).unwrap();
        let rows = table.strip_prefix(HEAD).unwrap_or_else(|| panic!("another head in {}", page.display()));
        assert_eq!(rows.lines().count(), SERVERS.len(), "{}", page.display());
        for (row, server) in rows.lines().zip(SERVERS) {
            assert!(is_of(row, server), "not as in tests/unmodified/servers.rs: {row}");
        }
    }
}

/// Whether a row is this server's: any version, any number of requests, and none that failed; or why it cannot.
fn is_of(row: &str, server: &Server) -> bool {
    let cells: Vec<_> = row.split(" | ").map(|cell| cell.trim_matches(['|', ' '])).collect();
    let [name, command, fresh, kept, failed] = cells[..] else { return false };
    let (before, after) = server.name.split_once("VERSION").unwrap();
    let number = |cell: &str| cell.split(' ').next().and_then(|number| number.replace(',', "").parse::<u64>().ok());
    let counted = match server.cannot {
        Some(reason) => fresh == cannot(reason),
        None => number(fresh) > Some(0) && (number(kept) > Some(0) || kept == "–") && failed == "0",
    };
    name.starts_with(before) && name.ends_with(after) && command == format!("`{}`", server.typed()) && counted
}

fn row(server: &Server) -> String {
    let outcome = Outcome::newest(server).unwrap_or_else(|| panic!("no result for {}: run its test", server.name));
    if let Some(reason) = server.cannot {
        let name = server.name.replace("VERSION", &outcome.version);
        return format!("| {name} | `{}` | {} | – | – |\n", server.typed(), cannot(reason));
    }
    assert_eq!(outcome.upgrades, 5);
    let kept = match outcome.kept_connections {
        connections if connections == outcome.kept => "–".to_owned(),
        connections => format!("{} on {connections}", thousands(outcome.kept)),
    };
    format!(
        "| {} | `{}` | {} | {kept} | {} |\n",
        server.name.replace("VERSION", &outcome.version),
        server.typed(),
        thousands(outcome.fresh),
        outcome.failed,
    )
}

fn cannot(reason: &str) -> String {
    format!("not upgraded: a second process ends with “{reason}”")
}

fn thousands(number: u64) -> String {
    if number < 1000 {
        return number.to_string();
    }
    format!("{},{:03}", thousands(number / 1000), number % 1000)
}

fn write() {
    let table = HEAD.to_owned() + &SERVERS.iter().map(row).collect::<String>();
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        let (before, rest) = text.split_once(BEGIN).unwrap();
        let (_, after) = rest.split_once(END).unwrap();
        fs::write(&page, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
    }
}
