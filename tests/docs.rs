//! The README and the docs keep up with the program.

use std::fs;
use std::path::Path;
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).unwrap()
}

#[test]
fn the_readme_has_every_flag_of_run() {
    let help = Command::new(env!("CARGO_BIN_EXE_zddsup")).args(["run", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let readme = readme();
    let flags = help.lines().filter_map(|line| line.trim_start().strip_prefix('-')).filter_map(|line| {
        let name = line.split("--").last()?.split([' ', '=']).next()?;
        Some(format!("--{}", name.trim_start_matches('-')))
    });
    let mut count = 0;
    for flag in flags.filter(|flag| flag != "--help" && flag != "--version") {
        count += 1;
        assert!(readme.contains(&flag), "README.md does not have {flag}");
    }
    assert!(count > 25, "only {count} flags were found in:\n{help}");
}

#[test]
fn the_readme_has_every_exit_code() {
    let codes = fs::read_to_string(root().join("docs/exit-codes.md")).unwrap();
    let help = Command::new(env!("CARGO_BIN_EXE_zddsup")).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let (_, listed) = help.split_once("EXIT CODES").unwrap();
    for code in listed.lines().filter_map(|line| line.split_whitespace().next()?.parse::<u8>().ok()) {
        assert!(codes.contains(&format!("| {code} |")) || codes.contains(&format!("`{code}`")), "exit code {code}");
    }
}

#[test]
fn links_lead_somewhere() {
    let mut pages = vec![root().join("README.md")];
    pages.extend(fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path()));
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).map(|rest| rest.split([')', '#']).next().unwrap()) {
            if !link.is_empty() && !link.contains("://") {
                assert!(page.parent().unwrap().join(link).exists(), "{}: {link}", page.display());
            }
        }
    }
}

#[test]
fn the_readme_has_the_table_of_servers() {
    let page = fs::read_to_string(root().join("docs/servers.md")).unwrap();
    let begin = page.find("<!-- servers:begin -->").unwrap();
    let end = page.find("<!-- servers:end -->").unwrap();
    assert!(readme().contains(&page[begin..end]), "README.md has another table than docs/servers.md");
}
