//! The pure state machine of one service. Imports nothing of the rest of the crate: no I/O, no clock, no async.
//!
//! ```text
//!            request(Upgrade | Rollback | Restart | Stop | Quit)     handle(Event)
//!                                   │                                  │
//!                                   ▼                                  ▼
//!   Stage:  Idle ─────────────> Starting ──ready──> (Canary ──last step, promote──>) Baking ──until──> Idle
//!            │ ▲                   │ candidate failed  │ candidate died, rollback
//!     incumbent└───────────────────┴───────────────────┘ (old one serves on, untouched)
//!      lost  ▼
//!          Backoff ──until──> Starting (recovery, from the recorded program)
//!                                   │
//!                                   ▼
//!                      poll_action()   poll_timeout()
//! ```
//!
//! | file | what it decides |
//! |---|---|
//! | [`machine`] | the state, and the table of events by phase |
//! | [`stage`] | what is in flight |
//! | [`canary`] | a share before the switch, in steps: promote, abort |
//! | [`upgrade`] | the transaction: start, switch, bake, fall back, what waits for its turn |
//! | [`recovery`] | the incumbent was lost: restart policy, backoff, limit |
//! | [`stopping`] | lame duck, graceful stop, quick stop, the end |
//! | [`generation`] | the phases that a generation goes through |

pub mod canary;
pub mod event;
pub mod generation;
pub mod machine;
pub mod policy;
pub mod recovery;
pub mod stage;
pub mod stopping;
pub mod upgrade;

pub use canary::Canary;
pub use event::{
    Abort, Action, Answer, Event, Failure, Finish, Kind, Notice, Outcome, Refusal, Request, Source, UpgradeId,
};
pub use generation::{End, Generation, GenerationId, Phase};
pub use machine::Machine;
pub use policy::{Policy, RestartLimit, RestartWhen, Time};
pub use stage::Stage;
