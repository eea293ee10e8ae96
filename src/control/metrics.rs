//! The state as `OpenMetrics` text.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode as encode_text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use super::types::{GenerationPhase, ServicePhase, Status, UpgradeReport, UpgradeResult};

/// What it is served as.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels = Vec<(&'static str, String)>;

/// All metrics of a service. Made anew for each reader, so that nothing has to be kept up to date.
#[must_use]
pub fn encode(status: &Status) -> String {
    let service = [("service".into(), status.service.clone().into())];
    let mut registry = Registry::with_prefix_and_labels("zddsup", service.into_iter());
    let version = ("version", status.supervisor.version.clone());
    registry.register("build", "Version of the supervisor", Info::new(vec![version]));
    supervisor(&mut registry, status);
    generations(&mut registry, status);
    upgrades(&mut registry, status);
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _written = encode_text(&mut text, &registry);
    text
}

fn supervisor(registry: &mut Registry, status: &Status) {
    let started = Gauge::<f64, AtomicU64>::default();
    started.set(seconds(status.supervisor.started_unix_ms));
    registry.register_with_unit("start_time", "When the supervisor was started, since 1970", Unit::Seconds, started);

    let phase = Family::<Labels, Gauge>::default();
    for &one in ServicePhase::ALL {
        phase.get_or_create(&vec![("phase", one.to_string())]).set(i64::from(one == status.phase));
    }
    registry.register("phase", "What the service is doing: 1 for that phase, 0 for the others", phase);

    gauge(registry, "serving_generation", "Number of the generation that serves; 0 for none", {
        status.serving.map_or(0, |serving| u64::from(serving.0))
    });
    gauge(registry, "stored_fds", "Fds in the store", as_u64(status.stored_fds));
    gauge(registry, "listeners", "Sockets that are held open", as_u64(status.listeners.len()));
    let restarts: Counter = Counter::default();
    restarts.inc_by(status.restarts);
    registry.register("restarts", "Starts after a loss", restarts);
}

fn generations(registry: &mut Registry, status: &Status) {
    let living = || status.generations.iter().filter(|generation| generation.phase != GenerationPhase::Retired);
    let mut by_phase: BTreeMap<&str, i64> = BTreeMap::new();
    for generation in living() {
        *by_phase.entry(generation.phase.word()).or_default() += 1;
    }
    let count = Family::<Labels, Gauge>::default();
    for phase in GenerationPhase::ALL.iter().filter(|&&phase| phase != GenerationPhase::Retired) {
        let labels = vec![("phase", phase.to_string())];
        count.get_or_create(&labels).set(by_phase.get(phase.word()).copied().unwrap_or(0));
    }
    registry.register("generations", "Generations that live, by phase", count);

    let connections = Family::<Labels, Gauge>::default();
    let age = Family::<Labels, Gauge<f64, AtomicU64>>::default();
    for generation in living() {
        let labels = vec![("generation", generation.number.to_string())];
        age.get_or_create(&labels).set(seconds(generation.age_ms));
        if let Some(established) = generation.connections {
            connections.get_or_create(&labels).set(i64::try_from(established).unwrap_or(i64::MAX));
        }
    }
    registry.register(
        "connections",
        "Established TCP connections of a generation, where they could be counted",
        connections,
    );
    registry.register_with_unit("generation_age", "Time since a generation's spawn", Unit::Seconds, age);
}

fn upgrades(registry: &mut Registry, status: &Status) {
    let mut under_way = status.upgrades.iter().filter(|report| report.result.is_none());
    let canary = under_way.find_map(|report| report.canary.as_ref()).filter(|_| status.phase == ServicePhase::Canary);
    let share = Gauge::<f64, AtomicU64>::default();
    share.set(canary.map_or(0.0, |canary| canary.share.fraction()));
    registry.register("canary_share", "Part of new connections that a canary gets, from 0 to 1; 0 without one", share);

    let ended = Family::<Labels, Counter>::default();
    for &result in UpgradeResult::ALL {
        let labels = vec![("result", result.to_string())];
        ended.get_or_create(&labels).inc_by(status.ended.get(&result).copied().unwrap_or(0));
    }
    registry.register("upgrades", "Transactions that ended (starts and restarts too), by result", ended);

    let last = status.upgrades.iter().find(|report| report.result.is_some());
    let succeeded = last.is_some_and(|report| report.result == Some(UpgradeResult::Succeeded));
    gauge(registry, "last_upgrade_id", "Number of the last transaction that ended; 0 for none", {
        last.map_or(0, |report| report.id)
    });
    gauge(registry, "last_upgrade_succeeded", "Whether it succeeded", u64::from(succeeded));
    let phases = Family::<Labels, Gauge<f64, AtomicU64>>::default();
    for (phase, ms) in last.map(phase_times).unwrap_or_default() {
        phases.get_or_create(&vec![("phase", phase.to_owned())]).set(seconds(ms));
    }
    registry.register_with_unit("last_upgrade_phase", "Time that each of its phases took", Unit::Seconds, phases);
}

fn phase_times(report: &UpgradeReport) -> BTreeMap<&'static str, u64> {
    let mut times = BTreeMap::new();
    for time in &report.phases {
        *times.entry(time.phase.word()).or_default() += time.ms;
    }
    times
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge: Gauge = Gauge::default();
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    registry.register(name, help, gauge);
}

fn as_u64(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

/// Milliseconds as seconds; exact up to 285,000 years.
#[allow(clippy::cast_precision_loss)]
fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::fixture;
    use crate::control::types::CanaryReport;

    #[test]
    fn says_what_the_status_says() {
        let mut status = fixture::status();
        status.service = "we\"b".to_owned();
        status.restarts = 2;
        status.ended.insert(UpgradeResult::Failed, 3);
        let text = encode(&status);
        for line in [
            "zddsup_phase{phase=\"serving\",service=\"we\\\"b\"} 1",
            "zddsup_phase{phase=\"baking\",service=\"we\\\"b\"} 0",
            "zddsup_serving_generation{service=\"we\\\"b\"} 3",
            "zddsup_restarts_total{service=\"we\\\"b\"} 2",
            "zddsup_upgrades_total{result=\"failed\",service=\"we\\\"b\"} 3",
            "zddsup_connections{generation=\"3\",service=\"we\\\"b\"} 12",
            "zddsup_generation_age_seconds{generation=\"3\",service=\"we\\\"b\"} 4.5",
        ] {
            // Labels have no order of their own.
            let swapped = text.lines().any(|found| labels(found) == labels(line));
            assert!(swapped, "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn the_share_of_a_canary_that_is_under_way() {
        let mut status = fixture::status();
        let share = "zddsup_canary_share{service=\"web\"} ";
        assert!(encode(&status).contains(&format!("{share}0.0\n")));
        let canary = CanaryReport { share: "5%".parse().unwrap(), from: Vec::new(), step: 1, steps: 1, by_hand: true };
        status.phase = ServicePhase::Canary;
        status.upgrades.insert(0, UpgradeReport { canary: Some(canary), ..fixture::report(4) });
        let text = encode(&status);
        assert!(text.contains(&format!("{share}0.05\n")), "{text}");
        status.upgrades[0].result = Some(UpgradeResult::Aborted);
        assert!(encode(&status).contains(&format!("{share}0.0\n")));
    }

    fn labels(line: &str) -> Vec<String> {
        let mut parts: Vec<_> = line.split(['{', '}', ',']).map(str::to_owned).collect();
        parts.sort();
        parts
    }
}
