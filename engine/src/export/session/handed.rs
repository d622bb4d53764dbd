//! A connection that goes from one process to another, between two requests.
//!
//! ```text
//! told to hand over ─► the request that has come in part ─► all replies sent ─► receive cancelled ─► Handed
//! ```
//!
//! Order is everything here: nothing is received once the last receive is cancelled, and what it brought, whole requests
//! or a part of one, goes along. Looked at before, bytes that came meanwhile would be nobody's.
use super::inbound::STAGING_LEN;
use super::{Chosen, Directory, Ending, Phase, RECEIVE, Session};
use crate::fault::{Fault, planted};
use crate::io::{Arena, Completion, File, Token, Waker};
use formats::nbd::Negotiated;
use formats::nbd::wire::{HEADER_LEN_MAX, Header};
use std::sync::Arc;

/// What is to be known of a connection to go on with it.
#[derive(Debug)]
pub struct Handed {
    /// The client is at its other end.
    pub socket: File,
    /// What was agreed upon.
    pub negotiated: Negotiated,
    /// What was received of requests that were not begun.
    pub unread: Vec<u8>,
}

impl Handed {
    /// The most that can have been received.
    pub const UNREAD_MAX: usize = STAGING_LEN + HEADER_LEN_MAX - 1;
}

impl Session {
    /// Goes on with a connection, whose export is chosen; `None` where its export is not there.
    pub fn resumed(
        handed: Handed,
        directory: Arc<dyn Directory>,
        arena: Arena,
        waker: Waker,
        base: Token,
    ) -> Option<Self> {
        let Handed { socket, negotiated, unread } = handed;
        let (gate, member) = directory.enter(&negotiated.export.name, socket.clone())?;
        let mut session = Self::new(socket, directory, arena, waker, base);
        session.inbound.expect_requests(Header::bytes(negotiated.style));
        session.inbound.take_up(&unread);
        session.phase = Phase::Chosen(Box::new(Chosen { negotiated, gate, member }));
        Some(session)
    }

    /// Gives the connection away, where it has ended so. `done` is what came of everything that was under way, which was
    /// cancelled.
    pub fn hand_over(mut self, done: Vec<Completion>) -> Option<Handed> {
        let receive = Token(self.base.0 + RECEIVE);
        for Completion { op, result, .. } in done.into_iter().filter(|completion| completion.token == receive) {
            self.inbound.complete(op, result);
        }
        match (self.phase, self.leaving) {
            (Phase::Transmission(transmission), Some(Ending::HandedOver)) if !self.outbound.is_broken() => {
                let negotiated = transmission.negotiated().clone();
                let unread = if planted(Fault::ForgetUnread) { Vec::new() } else { self.inbound.left() };
                Some(Handed { socket: self.socket, negotiated, unread })
            }
            _ => None,
        }
    }
}
