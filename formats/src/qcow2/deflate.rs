//! Clusters, compressed: as QEMU compresses them, and so that QEMU can inflate them.
use super::header::Compression;
use flate2::{Compress, Compression as Level, FlushCompress, Status};
use std::cell::RefCell;
use zstd::bulk::Compressor;

/// QEMU inflates with a window of 2 to this bytes; a stream with a larger one it takes for corrupt.
const WINDOW_BITS: u8 = 12;
/// zstd's own default.
const ZSTD_LEVEL: i32 = 3;

/// Compresses `cluster` into `compressed`; says how many bytes that are. `None` where it does not become
/// shorter than it is or than there is room for: such a cluster is written as it is.
pub fn deflate(compression: Compression, cluster: &[u8], compressed: &mut [u8]) -> Option<usize> {
    let room = compressed.len().min(cluster.len().saturating_sub(1));
    let compressed = &mut compressed[..room];
    match compression {
        Compression::Zlib => deflate_zlib(cluster, compressed),
        Compression::Zstd => deflate_zstd(cluster, compressed),
    }
}

fn deflate_zlib(cluster: &[u8], compressed: &mut [u8]) -> Option<usize> {
    thread_local!(static STREAM: RefCell<Compress> =
        RefCell::new(Compress::new_with_window_bits(Level::default(), false, WINDOW_BITS)));
    STREAM.with_borrow_mut(|stream| {
        stream.reset();
        match stream.compress(cluster, compressed, FlushCompress::Finish) {
            Ok(Status::StreamEnd) => Some(stream.total_out() as usize),
            _ => None,
        }
    })
}

fn deflate_zstd(cluster: &[u8], compressed: &mut [u8]) -> Option<usize> {
    thread_local!(static COMPRESSOR: RefCell<Option<Compressor<'static>>> = const { RefCell::new(None) });
    COMPRESSOR.with_borrow_mut(|kept| {
        if kept.is_none() {
            *kept = Compressor::new(ZSTD_LEVEL).ok();
        }
        // It fails where there is no room; whatever else it may be, the cluster can be written as it is.
        kept.as_mut()?.compress_to_buffer(cluster, compressed).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::deflate;
    use crate::qcow2::Compression;
    use crate::qcow2::inflate::inflate;

    #[test]
    fn what_is_compressed_is_inflated_again() {
        for compression in [Compression::Zlib, Compression::Zstd] {
            for len in [512, 4096, 65536, 2 << 20] {
                let cluster: Vec<u8> = (0..len as u32).map(|at| (at / 77) as u8).collect();
                let mut compressed = vec![0; len];
                let made = deflate(compression, &cluster, &mut compressed).expect("it becomes shorter");
                assert!(made < len);
                let mut inflated = vec![0; len];
                inflate(compression, &compressed[..made], &mut inflated).expect("valid");
                assert!(inflated == cluster, "{compression}, {len} bytes");
                assert_eq!(deflate(compression, &cluster, &mut compressed[..made - 1]), None, "no room");
            }
        }
    }

    #[test]
    fn noise_is_written_as_it_is() {
        let mut state = 1_u64;
        let noise: Vec<u8> = (0..4096)
            .map(|_| {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                (state >> 33) as u8
            })
            .collect();
        for compression in [Compression::Zlib, Compression::Zstd] {
            assert_eq!(deflate(compression, &noise, &mut vec![0; 8192]), None, "{compression}");
        }
    }
}
