//! Compressed clusters, inflated: never more than one cluster, whatever the bytes say.
use super::header::Compression;
use crate::error::{Error, Result};
use flate2::{Decompress, FlushDecompress, Status};
use std::cell::RefCell;
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

/// Inflates `compressed` to fill `cluster`. What follows the stream is ignored: an entry counts
/// whole sectors, and the last one has the next cluster's bytes or padding.
pub fn inflate(compression: Compression, compressed: &[u8], cluster: &mut [u8]) -> Result<()> {
    match compression {
        Compression::Zlib => inflate_deflate(compressed, cluster),
        Compression::Zstd => inflate_zstd(compressed, cluster),
    }
}

fn inflate_deflate(compressed: &[u8], cluster: &mut [u8]) -> Result<()> {
    let mut stream = Decompress::new(false);
    let status = stream.decompress(compressed, cluster, FlushDecompress::Finish);
    // A full cluster is enough; QEMU does not ask for the end of the stream either.
    match status {
        Ok(_) if stream.total_out() == cluster.len() as u64 => Ok(()),
        Ok(Status::StreamEnd) => Err(short(stream.total_out(), cluster.len())),
        Ok(_) => Err(Error::malformed(format!("a compressed cluster breaks off after {} bytes", stream.total_out()))),
        Err(error) => Err(Error::malformed(format!("a compressed cluster is no deflate stream: {error}"))),
    }
}

fn inflate_zstd(compressed: &[u8], cluster: &mut [u8]) -> Result<()> {
    thread_local!(static DECODER: RefCell<Option<Decoder<'static>>> = const { RefCell::new(None) });
    let wrong = |error| Error::malformed(format!("a compressed cluster is no zstd frame: {error}"));
    DECODER.with_borrow_mut(|kept| {
        let decoder = match kept {
            Some(decoder) => decoder,
            None => kept.insert(new_decoder().map_err(wrong)?),
        };
        decoder.reinit().map_err(wrong)?;
        let len = cluster.len();
        let (mut from, mut to) = (InBuffer::around(compressed), OutBuffer::around(cluster));
        while to.pos() < len {
            let before = (from.pos(), to.pos());
            let more = decoder.run(&mut from, &mut to).map_err(wrong)?;
            if to.pos() < len && (more == 0 || (from.pos(), to.pos()) == before) {
                return Err(short(to.pos() as u64, len));
            }
        }
        Ok(())
    })
}

fn new_decoder() -> std::io::Result<Decoder<'static>> {
    let mut decoder = Decoder::new()?;
    // The bound on the window bounds the memory: no cluster has more than 2 MiB.
    decoder.set_parameter(DParameter::WindowLogMax(23))?;
    Ok(decoder)
}

fn short(got: u64, wanted: usize) -> Error {
    Error::malformed(format!("a compressed cluster has {got} bytes where {wanted} were expected"))
}

#[cfg(test)]
mod tests {
    use super::inflate;
    use crate::qcow2::Compression;
    use flate2::{Compress, Compression as Level, FlushCompress};

    fn cluster() -> Vec<u8> {
        (0..65536_u32).map(|at| (at / 77) as u8).collect()
    }

    fn deflated() -> Vec<u8> {
        let mut bytes = vec![0; 65536];
        let mut stream = Compress::new_with_window_bits(Level::default(), false, 12);
        stream.compress(&cluster(), &mut bytes, FlushCompress::Finish).expect("room enough");
        bytes.truncate(stream.total_out() as usize);
        bytes
    }

    #[test]
    fn what_follows_a_stream_is_ignored() {
        let zstd = zstd::stream::encode_all(&cluster()[..], 3).expect("compresses");
        for (compression, mut bytes) in [(Compression::Zlib, deflated()), (Compression::Zstd, zstd)] {
            for padding in [0, 1, 511] {
                bytes.resize(bytes.len() + padding, 0xa5 * (padding % 2) as u8);
                let mut inflated = vec![0; 65536];
                inflate(compression, &bytes, &mut inflated).expect("valid");
                assert!(inflated == cluster(), "{compression}, padding {padding}");
            }
        }
    }

    #[test]
    fn broken_streams_are_errors() {
        let zstd = zstd::stream::encode_all(&cluster()[..], 3).expect("compresses");
        for (compression, bytes) in [(Compression::Zlib, deflated()), (Compression::Zstd, zstd)] {
            let mut inflated = vec![0; 65536];
            assert!(inflate(compression, &bytes[..bytes.len() / 2], &mut inflated).is_err(), "{compression}: cut");
            assert!(inflate(compression, &[], &mut inflated).is_err(), "{compression}: empty");
            assert!(inflate(compression, &[0xff; 100], &mut inflated).is_err(), "{compression}: noise");
            let mut larger = vec![0; 65537];
            assert!(inflate(compression, &bytes, &mut larger).is_err(), "{compression}: too short a cluster");
            let mut smaller = vec![0; 65535];
            assert!(inflate(compression, &bytes, &mut smaller).is_ok(), "{compression}: bounded");
        }
    }
}
