use super::*;

fn stat(pid: i32, parent: i32, group: i32, session: i32) -> (i32, Stat) {
    let member = Member { pid, start_ticks: 10 };
    (pid, Stat { member, lives: true, of_kernel: false, parent, group, session })
}

const LEADER: Member = Member { pid: 100, start_ticks: 10 };

fn pids(known: &mut Known, stats: &[(i32, Stat)], marked: &[i32]) -> Vec<i32> {
    let is_marked = |pid| if marked.contains(&pid) { Marked::Yes } else { Marked::No };
    let found = known.sort_out(LEADER, stats.iter().copied().collect(), is_marked, Instant::now());
    found.living.into_iter().map(|member| member.pid).collect()
}

fn known() -> Known {
    Known { members: BTreeSet::from([LEADER]), ..Known::default() }
}

#[test]
fn another_process_with_the_same_pid_is_not_opened() {
    let own = Member::of(Pid::this()).unwrap();
    own.open().unwrap();
    let before = Member { start_ticks: own.start_ticks - 1, ..own };
    assert!(is_gone(&before.open().unwrap_err()));
}

#[test]
fn members_are_found_by_group_parent_and_marker_and_through_each_other() {
    let stats = [
        stat(100, 1, 100, 50),
        stat(101, 100, 100, 50),
        // Called setsid, and is a child still.
        stat(102, 101, 102, 102),
        // An orphan in the session that 102 leads.
        stat(103, 1, 103, 102),
        // An orphan with the marker, and its child.
        stat(104, 1, 104, 104),
        stat(105, 104, 105, 105),
        // In zddsup's session, and of another generation.
        stat(106, 1, 106, 50),
        stat(107, 106, 106, 50),
    ];
    assert_eq!(pids(&mut known(), &stats, &[104]), [100, 101, 102, 103, 104, 105]);
}

#[test]
fn one_that_is_dead_does_not_count_and_its_children_do() {
    let mut leader = stat(100, 1, 100, 50);
    leader.1.lives = false;
    assert_eq!(pids(&mut known(), &[leader, stat(101, 100, 101, 101)], &[]), [101]);
    assert_eq!(pids(&mut known(), &[leader], &[]), [0; 0]);
}

#[test]
fn a_member_stays_one() {
    let mut known = known();
    assert_eq!(pids(&mut known, &[stat(101, 1, 100, 50), stat(102, 101, 100, 50)], &[]), [101, 102]);
    // Its parent is gone, and it is in a session of its own with an environment of its own.
    assert_eq!(pids(&mut known, &[stat(102, 1, 102, 102)], &[]), [102]);
    let mut stranger = stat(102, 1, 102, 102);
    stranger.1.member.start_ticks = 20;
    assert_eq!(pids(&mut known, &[stranger], &[]), [0; 0]);
}

#[test]
fn a_number_that_others_have_by_now_is_not_ours() {
    let mut known = known();
    assert_eq!(pids(&mut known, &[stat(101, 1, 100, 50)], &[]), [101]);
    // One that got away lives, the group is over …
    assert_eq!(pids(&mut known, &[stat(102, 1, 102, 102)], &[102]), [102]);
    // … and a stranger gets its number.
    let mut stranger = stat(100, 1, 100, 50);
    stranger.1.member.start_ticks = 20;
    assert_eq!(pids(&mut known, &[stat(102, 1, 102, 102), stranger, stat(108, 100, 100, 50)], &[]), [102]);
}

#[test]
fn one_in_the_middle_of_execve_is_looked_at_again() {
    let mut known = known();
    let now = Instant::now();
    let mut look = |marked| known.sort_out(LEADER, BTreeMap::from([stat(102, 1, 102, 102)]), |_| marked, now);
    for _ in 0..1000 {
        assert_eq!(look(Marked::Unknown), Found { living: Vec::new(), in_doubt: true });
    }
    let member = Member { pid: 102, start_ticks: 10 };
    assert_eq!(look(Marked::Yes), Found { living: vec![member], in_doubt: false });
}

#[test]
fn where_one_died_meanwhile_another_look_is_needed() {
    let mut known = known();
    let mut dead = stat(102, own_pid(), 102, 102);
    dead.1.lives = false;
    let mut look =
        |stats: &[(i32, Stat)]| known.sort_out(LEADER, stats.iter().copied().collect(), |_| Marked::No, Instant::now());
    assert_eq!(look(&[dead]), Found { living: Vec::new(), in_doubt: true });
    // It is not reaped, and says nothing new.
    assert_eq!(look(&[dead]), Found { living: Vec::new(), in_doubt: false });
    // Another one's child is that one's business.
    let mut others = stat(103, 1, 103, 103);
    others.1.lives = false;
    assert_eq!(look(&[dead, others]), Found { living: Vec::new(), in_doubt: false });
}

#[test]
fn one_that_never_gets_an_environment_is_given_up() {
    let mut known = known();
    let others = BTreeMap::from([stat(102, 1, 102, 102)]);
    let begin = Instant::now();
    let mut in_doubt = |now| known.sort_out(LEADER, others.clone(), |_| Marked::Unknown, now).in_doubt;
    assert!(in_doubt(begin));
    assert!(in_doubt(begin + LONGEST_EXECVE / 2));
    assert!(!in_doubt(begin + LONGEST_EXECVE));
}
