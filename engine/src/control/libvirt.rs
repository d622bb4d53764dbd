//! The same requests by libvirt's numbers: `virDomainBlockRebase` with its copy flags, and
//! `virDomainBlockJobAbort`.
use crate::control::{Code, MirrorRequest, OnError, PivotRequest, Refusal, Request, TargetFormat};

/// `VIR_DOMAIN_BLOCK_REBASE_SHALLOW`: copy only what the top layer holds.
pub const REBASE_SHALLOW: u32 = 1;
/// `VIR_DOMAIN_BLOCK_REBASE_REUSE_EXT`: the target is there already.
pub const REBASE_REUSE_EXT: u32 = 2;
/// `VIR_DOMAIN_BLOCK_REBASE_COPY_RAW`: the target is raw.
pub const REBASE_COPY_RAW: u32 = 4;
/// `VIR_DOMAIN_BLOCK_REBASE_COPY`: a copy, the only kind of rebase that is done here.
pub const REBASE_COPY: u32 = 8;
/// `VIR_DOMAIN_BLOCK_REBASE_RELATIVE`: a backing name that is relative.
pub const REBASE_RELATIVE: u32 = 16;
/// `VIR_DOMAIN_BLOCK_REBASE_COPY_DEV`: the target is a block device.
pub const REBASE_COPY_DEV: u32 = 32;
/// `VIR_DOMAIN_BLOCK_REBASE_BANDWIDTH_BYTES`: the bandwidth is in bytes, not MiB, a second.
pub const REBASE_BANDWIDTH_BYTES: u32 = 64;
/// `VIR_DOMAIN_BLOCK_JOB_ABORT_ASYNC`: answered when it has begun.
pub const ABORT_ASYNC: u32 = 1;
/// `VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT`: make the target the disk that is served.
pub const ABORT_PIVOT: u32 = 2;

const COPY_ONLY: u32 = REBASE_SHALLOW | REBASE_REUSE_EXT | REBASE_COPY_RAW | REBASE_COPY_DEV;

/// The copy that `virDomainBlockRebase(export, base, bandwidth, flags)` asks for.
///
/// # Errors
/// `INVALID_ARG` for flags that are unknown or need a copy, for a copy without a `base`, and for a bandwidth that does
/// not fit; `ARGUMENT_UNSUPPORTED` for a relative backing; `OPERATION_UNSUPPORTED` for a rebase that is no copy.
pub fn rebase(export: String, base: Option<String>, bandwidth: u64, flags: u32) -> Result<MirrorRequest, Refusal> {
    let unknown = flags & !(COPY_ONLY | REBASE_COPY | REBASE_RELATIVE | REBASE_BANDWIDTH_BYTES);
    if unknown != 0 {
        return Err(Refusal::new(Code::InvalidArg, format!("flags {flags}: {unknown:#x} is not supported")));
    }
    if flags & REBASE_COPY == 0 {
        return Err(match flags & COPY_ONLY {
            0 => Refusal::new(Code::OperationUnsupported, "a rebase that is no copy (flag 8) is not supported"),
            only => Refusal::new(Code::InvalidArg, format!("flags {flags}: {only:#x} requires a copy job (flag 8)")),
        });
    }
    if flags & REBASE_RELATIVE != 0 {
        let message = "a relative backing name (flag 16) is not supported in a copy: make the target with one first, \
                       and use flag 2";
        return Err(Refusal::new(Code::ArgumentUnsupported, message));
    }
    let target = base.ok_or_else(|| Refusal::new(Code::InvalidArg, "a copy needs a base: the target's path"))?;
    Ok(MirrorRequest {
        export,
        target,
        shallow: flags & REBASE_SHALLOW != 0,
        reuse_external: flags & REBASE_REUSE_EXT != 0,
        format: (flags & REBASE_COPY_RAW != 0).then_some(TargetFormat::Raw),
        block_device: flags & REBASE_COPY_DEV != 0,
        speed: bytes_per_s(bandwidth, flags)?,
        // As libvirt has QEMU do it.
        on_target_error: OnError::Report,
        ..MirrorRequest::default()
    })
}

/// What `virDomainBlockJobAbort(export, flags)` asks for, and whether its answer waits for the end.
///
/// # Errors
/// `INVALID_ARG` for an unknown flag.
pub fn abort(export: String, flags: u32) -> Result<(Request, bool), Refusal> {
    let unknown = flags & !(ABORT_ASYNC | ABORT_PIVOT);
    if unknown != 0 {
        return Err(Refusal::new(Code::InvalidArg, format!("flags {flags}: {unknown:#x} is not supported")));
    }
    let wait = flags & ABORT_ASYNC == 0;
    Ok(match flags & ABORT_PIVOT {
        0 => (Request::Cancel { export, force: false }, wait),
        _ => (Request::Pivot(PivotRequest::of(export)), wait),
    })
}

fn bytes_per_s(bandwidth: u64, flags: u32) -> Result<u64, Refusal> {
    if flags & REBASE_BANDWIDTH_BYTES != 0 {
        return Ok(bandwidth);
    }
    bandwidth
        .checked_mul(1 << 20)
        .ok_or_else(|| Refusal::new(Code::InvalidArg, format!("bandwidth {bandwidth} MiB/s is too large")))
}

#[cfg(test)]
mod tests {
    use super::{abort, rebase};
    use crate::control::{Code, MirrorRequest, PivotRequest, Refusal, Request, TargetFormat};

    fn copy(bandwidth: u64, flags: u32) -> Result<MirrorRequest, Refusal> {
        rebase("vda".into(), Some("/t".into()), bandwidth, flags)
    }

    fn code(result: Result<MirrorRequest, Refusal>) -> Option<Code> {
        result.err().map(|refusal| refusal.code)
    }

    #[test]
    fn the_combinations_with_copy_are_requests_of_their_own() {
        for bits in 0..8u32 {
            for device in [0, 32] {
                let request = copy(2, 8 | bits | device).expect("a copy");
                assert_eq!(request.shallow, bits & 1 != 0);
                assert_eq!(request.reuse_external, bits & 2 != 0);
                assert_eq!(request.format, (bits & 4 != 0).then_some(TargetFormat::Raw));
                assert_eq!(request.block_device, device != 0);
                assert_eq!(request.speed, 2 << 20, "MiB/s without flag 64");
                assert!(request.auto_finalize && request.auto_dismiss && !request.dry_run);
            }
        }
    }

    #[test]
    fn copy_flags_without_a_copy_are_invalid() {
        for bits in (1..8).chain([32, 33, 1 | 16]) {
            assert_eq!(code(copy(0, bits)), Some(Code::InvalidArg), "{bits}");
        }
        for flags in [0, 16, 64] {
            assert_eq!(code(rebase("vda".into(), None, 0, flags)), Some(Code::OperationUnsupported), "{flags}");
        }
        assert_eq!(code(rebase("vda".into(), None, 0, 8)), Some(Code::InvalidArg));
        assert_eq!(code(copy(0, 8 | 16)), Some(Code::ArgumentUnsupported));
        assert_eq!(code(copy(0, 8 | 128)), Some(Code::InvalidArg));
    }

    #[test]
    fn bandwidth_overflow_is_refused() {
        assert_eq!(code(copy(u64::MAX, 8)), Some(Code::InvalidArg));
        assert_eq!(copy(u64::MAX, 8 | 64).map(|request| request.speed), Ok(u64::MAX));
    }

    #[test]
    fn abort_flags_choose_the_verb_and_the_wait() {
        let cancel = Request::Cancel { export: "vda".into(), force: false };
        assert_eq!(abort("vda".into(), 0), Ok((cancel.clone(), true)));
        assert_eq!(abort("vda".into(), 1), Ok((cancel, false)));
        assert_eq!(abort("vda".into(), 2), Ok((Request::Pivot(PivotRequest::of("vda")), true)));
        assert_eq!(abort("vda".into(), 3), Ok((Request::Pivot(PivotRequest::of("vda")), false)));
        assert!(abort("vda".into(), 4).is_err());
    }
}
