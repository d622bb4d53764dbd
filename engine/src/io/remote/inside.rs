//! TLS on a connection to a server, for those that wait and for those that are stepped.
//!
//! What is said in plain has gone, and was answered, before it begins: the negotiation says when. It ends with its
//! connection; what was asked and not answered is asked again by the next one, inside a TLS of its own.
use super::super::Gather;
use super::PIECE_LEN;
use crate::tls::{ClientCredentials, Tls};
use std::sync::Arc;

/// One connection's TLS.
#[derive(Debug)]
pub(super) struct Inside {
    tls: Tls,
    credentials: Arc<ClientCredentials>,
    decrypted: Vec<u8>,
    /// Memory of the last send, to be used again.
    spare: Gather,
    /// Something of the server's has come.
    heard: bool,
}

impl Inside {
    /// TLS with the server that has just said ACK.
    pub fn new(credentials: &Arc<ClientCredentials>) -> Result<Self, String> {
        let tls = credentials.connection().map_err(|error| credentials.in_words(&error))?;
        let decrypted = vec![0; PIECE_LEN + Tls::RECORD_MAX];
        Ok(Self { tls, credentials: Arc::clone(credentials), decrypted, spare: Gather::default(), heard: false })
    }

    /// Looks into `received`, which has `PIECE_LEN` bytes at most. How much is in `decrypted`; perhaps nothing.
    pub fn decrypt(&mut self, received: &[u8]) -> Result<usize, String> {
        let decrypted = self.tls.decrypt(received, &mut self.decrypted);
        let count = decrypted.map_err(|error| self.credentials.in_words(&error))?;
        self.heard |= count > 0;
        Ok(count)
    }

    /// What `decrypt` found last is the first of this.
    pub fn decrypted(&self) -> &[u8] {
        &self.decrypted
    }

    /// True where the server said that it sends no more.
    pub fn has_ended(&self) -> bool {
        self.tls.peer_has_ended()
    }

    /// What is to be sent next: TLS' own, or what is taken out of `outbound`, which waits until the server is known to
    /// be who was meant. One send at a time.
    pub fn encrypt(&mut self, outbound: &mut Gather) -> Option<Gather> {
        let gather = match () {
            () if self.tls.has_to_say() => {
                let room = std::mem::take(&mut self.spare);
                self.tls.encrypt_more(room)
            }
            () if outbound.is_empty() || self.tls.is_shaking_hands() => return None,
            () => self.tls.encrypt(std::mem::take(outbound)),
        };
        Some(gather).filter(|gather| !gather.is_empty())
    }

    /// A send has gone.
    pub fn sent(&mut self, mut gather: Gather) {
        gather.clear();
        self.spare = gather;
    }

    /// What TLS still has to say, an alert perhaps, and that nothing more follows; before that `farewell`.
    pub fn last_words(&mut self, farewell: &[u8]) -> Gather {
        self.tls.last_words(farewell)
    }

    /// True where the server has said something inside.
    pub fn has_heard(&self) -> bool {
        self.heard
    }

    /// What a server may mean that hangs up and has said nothing inside.
    pub fn hung_up(&self) -> String {
        format!("the server hung up when TLS had begun: perhaps {}", self.credentials.turned_away())
    }
}
