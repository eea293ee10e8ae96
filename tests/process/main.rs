//! Real processes: what a child is and has, why one cannot be started, groups, output.
//!
//! The reaper reaps every child, so these tests take turns, and no child is made here in any other way.

#[path = "../common/cgroup.rs"]
mod cgroup;
mod cgroups;
mod children;
mod failures;
mod groups;
mod inheritance;
mod output;
mod trapped;
