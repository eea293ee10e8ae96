//! The layers of docs/architecture.md: a new arrow between modules fails here until the page has it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Who may use whom, as the table of docs/architecture.md says.
fn allowed() -> BTreeSet<(String, String)> {
    let page = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let (_, modules) = page.split_once("## Modules").expect("a section on modules");
    let quoted = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    let mut arrows = BTreeSet::new();
    for row in modules.lines().take_while(|line| !line.starts_with("## ")) {
        if let [_, module, _, uses, _] = row.split('|').collect::<Vec<_>>()[..] {
            for module in quoted(module) {
                arrows.extend(quoted(uses).into_iter().map(|used| (module.clone(), used)));
            }
        }
    }
    arrows
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(directory: &Path, into: &mut Vec<std::path::PathBuf>) {
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

/// Arrows that the code has: every `crate::module` that is written.
fn arrows() -> BTreeSet<(String, String)> {
    let src = root().join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut arrows = BTreeSet::new();
    for file in files {
        let inside = file.strip_prefix(&src).unwrap();
        let Some(module) = inside.parent().and_then(|parent| parent.iter().next()) else { continue };
        let module = module.to_str().unwrap().to_owned();
        let text = fs::read_to_string(&file).unwrap();
        for (at, _) in text.match_indices("crate::") {
            let rest = &text[at + 7..];
            let names = match rest.strip_prefix('{') {
                Some(list) => list.split('}').next().unwrap().split(',').map(str::trim).collect(),
                None => vec![rest],
            };
            for name in names {
                let used: String = name.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                if used != module && !used.is_empty() {
                    arrows.insert((module.clone(), used));
                }
            }
        }
    }
    arrows
}

#[test]
fn modules_use_only_what_the_page_shows() {
    let (allowed, arrows) = (allowed(), arrows());
    assert!(!allowed.is_empty(), "no table of modules in docs/architecture.md");
    let new: Vec<_> = arrows.difference(&allowed).collect();
    assert!(new.is_empty(), "arrows that docs/architecture.md does not have: {new:?}");
    let gone: Vec<_> = allowed.difference(&arrows).collect();
    assert!(gone.is_empty(), "arrows of docs/architecture.md that the code does not have: {gone:?}");
}

#[test]
fn the_core_stands_alone() {
    let core: Vec<_> = arrows().into_iter().filter(|(from, _)| from == "core" || from == "sys").collect();
    assert!(core.is_empty(), "{core:?}");
}

#[test]
fn the_core_reads_no_clock_and_does_no_io() {
    let mut files = Vec::new();
    sources(&root().join("src/core"), &mut files);
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        for forbidden in
            ["Instant::now", "SystemTime", "tokio::", "nix::", "libc::", "std::fs", "std::net", "std::process"]
        {
            assert!(!text.contains(forbidden), "{} has {forbidden}", file.display());
        }
    }
}
