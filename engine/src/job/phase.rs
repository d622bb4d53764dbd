//! The phases of a job: one table that does nothing itself.
//!
//! ```text
//!            ┌───────────► failed ◄──────────┐
//! seeding ─► converging ◄─► ready ─► pivoting ─► pivoted
//!    └───────────┴────────────┴───► cancelled
//! ```

/// Where a mirror stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Everything is brought over once.
    Seeding,
    /// Catching up with the guest.
    Converging,
    /// Clean, or as good as: a pivot may be asked for.
    Ready,
    /// Between the gate's closing and its opening.
    Pivoting,
    /// The target is the truth.
    Pivoted,
    /// Ended on request; the source is the truth.
    Cancelled,
    /// Ended on an error; the source is the truth.
    Failed,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happened {
    /// Every chunk was brought over once.
    SeedDone,
    /// The backlog fits in a pause, and the target is durable up to it.
    CaughtUp,
    /// The backlog grew past it again.
    FellBehind,
    /// The gate closes for the end.
    EndBegan,
    /// The record is durable and the export switched.
    PivotDone,
    /// The end stopped before its point of no return.
    EndUndone,
    /// An operator's wish to end was carried out.
    CancelDone,
    /// An error that no retry mends.
    Broke,
}

impl Phase {
    /// The phase after `happened`; `None` where that has no place.
    pub fn on(self, happened: Happened) -> Option<Self> {
        use Happened::{Broke, CancelDone, CaughtUp, EndBegan, EndUndone, FellBehind, PivotDone, SeedDone};
        Some(match (self, happened) {
            (Self::Seeding, SeedDone) | (Self::Ready, FellBehind) => Self::Converging,
            (Self::Converging, CaughtUp) | (Self::Pivoting, EndUndone) => Self::Ready,
            (Self::Ready, EndBegan) => Self::Pivoting,
            (Self::Pivoting, PivotDone) => Self::Pivoted,
            (Self::Seeding | Self::Converging | Self::Ready | Self::Pivoting, CancelDone) => Self::Cancelled,
            (Self::Seeding | Self::Converging | Self::Ready | Self::Pivoting, Broke) => Self::Failed,
            _ => return None,
        })
    }

    /// Its name, as `status` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Seeding => "seeding",
            Self::Converging => "converging",
            Self::Ready => "ready",
            Self::Pivoting => "pivoting",
            Self::Pivoted => "pivoted",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }

    /// True where the job is over.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Pivoted | Self::Cancelled | Self::Failed)
    }
}

#[cfg(test)]
mod tests {
    use super::{Happened, Phase};

    #[test]
    fn what_is_over_stays_over() {
        let everything = [
            Happened::SeedDone,
            Happened::CaughtUp,
            Happened::FellBehind,
            Happened::EndBegan,
            Happened::PivotDone,
            Happened::EndUndone,
            Happened::CancelDone,
            Happened::Broke,
        ];
        for over in [Phase::Pivoted, Phase::Cancelled, Phase::Failed] {
            assert!(over.is_over());
            assert!(everything.iter().all(|happened| over.on(*happened).is_none()), "{over:?}");
        }
    }

    #[test]
    fn only_a_ready_job_pivots() {
        for phase in [Phase::Seeding, Phase::Converging, Phase::Pivoting, Phase::Pivoted] {
            assert_eq!(phase.on(Happened::EndBegan), None, "{phase:?}");
        }
        assert_eq!(Phase::Ready.on(Happened::EndBegan), Some(Phase::Pivoting));
        assert_eq!(Phase::Pivoting.on(Happened::EndUndone), Some(Phase::Ready));
    }
}
