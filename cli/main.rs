//! The program: words in, requests out.

fn main() {}
