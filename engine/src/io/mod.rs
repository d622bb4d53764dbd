//! Operations on files and sockets.
