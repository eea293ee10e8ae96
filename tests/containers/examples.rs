//! The files of `examples/container` and the commands of docs/containers.md: they can be read, name nothing that zddsup does
//! not have, fit together, and run.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::Parser;
use serde_json::Value;
use zddsup::cli::{self, Cli};
use zddsup::config::ServiceConfig;

use crate::common::real::installed;
use crate::common::PATIENCE;
use crate::stage::{Container, Running};

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// A YAML file's documents. None where no parser is installed, with the reason printed.
fn yaml(name: &str) -> Option<Vec<Value>> {
    if !installed("python3-yaml", &["/usr/bin/python3", "-c", "import yaml"]) {
        return None;
    }
    let script = "import json, sys, yaml; json.dump(list(yaml.safe_load_all(open(sys.argv[1]))), sys.stdout)";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/container").join(name);
    let output = Command::new("/usr/bin/python3").args(["-c", script]).arg(path).stderr(Stdio::inherit()).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{name} is no YAML");
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

/// An instruction of the Containerfile that has its words as JSON.
fn instruction(name: &str) -> Vec<String> {
    let text = read("examples/container/Containerfile");
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    serde_json::from_str(&line[line.find('[').unwrap()..]).unwrap()
}

fn words(list: &Value) -> Vec<String> {
    serde_json::from_value(list.clone()).unwrap()
}

/// What starts the container.
fn entry_point() -> Vec<String> {
    [instruction("ENTRYPOINT"), instruction("CMD")].concat()
}

#[track_caller]
fn parse(words: &[String]) -> cli::Command {
    Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{words:?}: {error}")).command
}

/// The configuration that `zddsup run …` has.
#[track_caller]
fn config(words: &[String]) -> ServiceConfig {
    let cli::Command::Run(flags) = parse(words) else { panic!("{words:?} runs nothing") };
    flags.validate().unwrap_or_else(|error| panic!("{words:?}: {error}"))
}

/// The longest that it takes to stop.
fn longest_stop(config: &ServiceConfig) -> Duration {
    config.lame_duck + config.drain_timeout.unwrap() + config.stop_timeout
}

/// The deployment's pod, and its container.
fn pod(documents: &[Value]) -> (&Value, &Value) {
    let deployment = documents.iter().find(|one| one["kind"] == "Deployment").unwrap();
    let pod = &deployment["spec"]["template"]["spec"];
    (pod, &pod["containers"][0])
}

#[test]
fn engines_wait_for_longer_than_a_stop_takes() {
    let limit = longest_stop(&config(&entry_point()));
    let (Some(kubernetes), Some(compose)) = (yaml("kubernetes.yaml"), yaml("compose.yaml")) else { return };
    let (pod, container) = pod(&kubernetes);
    let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap();
    assert!(Duration::from_secs(grace) > longest_stop(&config(&words(&container["command"]))));
    let grace = compose[0]["services"]["web"]["stop_grace_period"].as_str().unwrap();
    assert!(Duration::from_secs(grace.trim_end_matches('s').parse().unwrap()) > limit);
    let told = read("examples/container/Containerfile").split("--stop-timeout ").nth(1).unwrap().to_owned();
    assert!(Duration::from_secs(told.split(' ').next().unwrap().parse().unwrap()) > limit);
}

#[test]
fn probes_ask_for_what_there_is() {
    parse(&instruction("HEALTHCHECK"));
    let Some(kubernetes) = yaml("kubernetes.yaml") else { return };
    let (_, container) = pod(&kubernetes);
    for probe in ["readinessProbe", "livenessProbe"] {
        parse(&words(&container[probe]["exec"]["command"]));
    }
    parse(&words(&container["lifecycle"]["preStop"]["exec"]["command"]));
}

#[test]
fn commands_of_the_page_are_commands_of_zddsup() {
    let page = read("docs/containers.md");
    let code = page.split("```").skip(1).step_by(2).flat_map(str::lines);
    let commands = code.filter_map(|line| Some(&line[line.find("zddsup ")?..line.find(" #").unwrap_or(line.len())]));
    let mut count = 0;
    for command in commands {
        count += 1;
        parse(&command.split_whitespace().map(|word| word.trim_matches(['"', '\'']).to_owned()).collect::<Vec<_>>());
    }
    assert!(count > 5, "only {count} commands were found");
}

/// Starts such a container, with the programs under test in the place of those of the image.
fn start(words: &[String]) -> Option<Running> {
    assert_eq!(words[..2], ["zddsup", "run"]);
    let here = |word: &String| match word.as_str() {
        "/srv/releases/current/server" => "/target/examples/axum_hello".to_owned(),
        "/etc/web/env" => "/volume/env".to_owned(),
        _ => word.clone(),
    };
    let words: Vec<_> = words[2..].iter().map(here).collect();
    let container = Container::new().tmpfs("/tmp").file("env", "VERSION=1\n");
    let mut running = container.run(&words.iter().map(String::as_str).collect::<Vec<_>>())?;
    running.wait_until_ready();
    Some(running)
}

#[test]
fn the_container_is_upgraded_and_stopped_as_it_says() {
    let Some(mut running) = start(&entry_point()) else { return };
    let load = running.load();
    running.must(&["upgrade", "--wait"]);
    assert!(load.more(50, PATIENCE));
    load.stop().assert_clean();
    running.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(running.wait().code(), Some(0), "{}", running.log());
}

#[test]
fn another_config_map_needs_no_other_pod() {
    let Some(kubernetes) = yaml("kubernetes.yaml") else { return };
    let (_, container) = pod(&kubernetes);
    let Some(mut running) = start(&words(&container["command"])) else { return };
    let load = running.load();
    running.write("env", "VERSION=2\n");
    running.must(&["upgrade", "--wait"]);
    assert!(load.saw("2", PATIENCE), "{}\n{}", load.so_far(), running.log());
    let summary = load.stop();
    summary.assert_clean();
    assert_eq!(summary.order(), ["1", "2"]);
    let hook = words(&container["lifecycle"]["preStop"]["exec"]["command"]);
    running.must(&hook[1..].iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(running.wait().code(), Some(0), "{}", running.log());
}
