//! What a job goes on with after its daemon has ended, by what that one left behind.
use formats::planes::{Header, Left};

/// Where a job begins, or goes on.
#[derive(Clone, Debug)]
pub struct TakenUp {
    /// What is marked.
    pub marks: Vec<u64>,
    /// Up to here the seeder has come.
    pub seen: u64,
    /// Marked chunks are compared, and only what differs is written.
    pub compare: bool,
    /// The target read as zeroes where the seeder has not been yet.
    pub target_is_zero: bool,
    /// Why it goes on in this way.
    pub why: Why,
}

/// Why a job goes on as it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It begins.
    New,
    /// The daemon was killed in this run of the system.
    Killed,
    /// The daemon was told to end, and left in order.
    Left,
    /// Nobody knows what the target lacks.
    Unknown(&'static str),
}

impl TakenUp {
    /// Nothing is known yet: the job begins.
    pub fn nothing(header: &Header) -> Self {
        let marks = header.all_before(0);
        Self { marks, seen: 0, compare: false, target_is_zero: header.target_is_zero, why: Why::New }
    }

    /// Everything may differ.
    pub fn everything(header: &Header, why: &'static str) -> Self {
        Self {
            marks: header.all_before(header.size),
            seen: header.size,
            compare: true,
            target_is_zero: false,
            why: Why::Unknown(why),
        }
    }

    /// What was left behind, in the run of the system that is `boot`.
    pub fn of(left: &Left, boot: [u64; 2]) -> Self {
        let header = &left.header;
        if left.is_unfollowed() {
            return Self::everything(header, "the job was ending, and the guest's writes were followed no more");
        }
        let why = match (left.is_in_order(), header.boot == boot) {
            (true, _) => Why::Left,
            (false, true) => Why::Killed,
            (false, false) => {
                return Self::everything(header, "the system ended without the daemon's having left in order");
            }
        };
        match left.dirty() {
            Ok(marks) => {
                Self { marks, seen: left.seen(), compare: left.compares(), target_is_zero: header.target_is_zero, why }
            }
            Err(_) => Self::everything(header, "the planes hold what cannot be"),
        }
    }

    /// Bytes that stay as they are on the target, that are brought over again, and that the seeder has to look
    /// at still.
    pub fn counts(&self, header: &Header) -> (u64, u64, u64) {
        let again = header.bytes(&self.marks);
        let unseen = header.size - self.seen.min(header.size);
        (header.size.saturating_sub(unseen).saturating_sub(again), again, unseen)
    }

    /// The same in a sentence, for who wants to know what a restart has cost.
    pub fn note(&self, header: &Header) -> Option<String> {
        let (kept, again, unseen) = self.counts(header);
        let ahead = match unseen {
            0 => String::new(),
            unseen => format!(", {unseen} were not looked at yet"),
        };
        let how = match self.why {
            Why::New => return None,
            Why::Unknown(why) => {
                return Some(format!(
                    "resumed: {why}, so source and target are compared ({again} bytes), and what differs is copied"
                ));
            }
            Why::Killed => "resumed after a kill",
            Why::Left => "resumed where it was left in order",
        };
        Some(format!("{how}: {kept} bytes of the target stay, {again} bytes are copied again{ahead}"))
    }
}
