//! A session that goes from one thread to another, as the value that it is.
//!
//! ```text
//! told to rest ─► the request that has come in part ─► all replies sent ─► Resting ─► receive taken back ─► move_to ─► begin
//! export chosen ─► the client is told ──────────────────────────────────────┘
//! ```
//!
//! Moved earlier, what is under way would come back to a thread that knows nothing of it. What the last receive brought
//! goes along, and so do the keys of TLS. Nobody is listened to for, for nothing waits; but whoever wakes the session
//! meanwhile wants it to look at its flags, which its first step there does.
use super::transmission::Transmission;
use super::{Chosen, PATIENCE, Phase, RECEIVE, Session, TOKENS};
use crate::io::{Arena, Completion, Token};
use std::ops::Range;

impl Session {
    /// Its operations' tokens.
    pub fn tokens(&self) -> Range<Token> {
        self.base..Token(self.base.0 + TOKENS)
    }

    /// Asks it to rest between two requests: its next steps lead to `Progress::Resting`, or to its end.
    pub fn rest(&mut self) {
        self.may_rest = true;
    }

    /// Goes to another thread, with the memory of that, and operations that are numbered from `base` on. After
    /// `Progress::Resting`; `done` is what came of everything of it that was under way here, which was cancelled.
    pub fn move_to(&mut self, arena: Arena, base: Token, done: Vec<Completion>) {
        let receive = self.token(RECEIVE);
        for Completion { op, result, .. } in done.into_iter().filter(|completion| completion.token == receive) {
            self.received(op, result);
        }
        (self.arena, self.base, self.begun) = (arena, base, false);
        let timer = self.token(PATIENCE);
        if let Phase::Transmission(transmission) = &mut self.phase {
            transmission.move_to(timer);
        }
    }

    /// Goes on. After `Progress::Resting`.
    pub fn begin(&mut self) {
        (self.may_rest, self.is_between) = (false, false);
        self.phase = match std::mem::replace(&mut self.phase, Phase::New) {
            Phase::Chosen(chosen) => {
                let Chosen { negotiated, gate, member } = *chosen;
                let timer = self.token(PATIENCE);
                Phase::Transmission(Box::new(Transmission::new(negotiated, gate, member, timer)))
            }
            phase => phase,
        }
    }
}
