//! Where NBD clients come in, as it is said on the command line.
use engine::control::options::Listener;

/// Who a socket belongs to; what is not said stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    pub user: Option<u32>,
    pub group: Option<u32>,
}

/// `HOST:PORT`, `[HOST]:PORT` or `vsock:CID:PORT`.
pub fn parse(text: &str) -> Result<Listener, String> {
    let Some(address) = text.strip_prefix("vsock:") else { return Ok(Listener::Tcp(text.to_owned())) };
    let wrong = || format!("{text:?} is no vsock address: vsock:CID:PORT, with CID * for any guest");
    let (cid, port) = address.split_once(':').ok_or_else(wrong)?;
    let cid = match cid {
        "*" => None,
        number => Some(number.parse().map_err(|_| wrong())?),
    };
    Ok(Listener::Vsock { cid, port: port.parse().map_err(|_| wrong())? })
}

/// Permission bits in octal.
pub fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err(format!("{text:?} is no mode: three octal digits, such as 660")),
    }
}

/// `USER`, `USER:GROUP` or `:GROUP`, by names or numbers.
pub fn owner(text: &str) -> Result<Owner, String> {
    let (user, group) = text.split_once(':').unwrap_or((text, ""));
    let user = look_up("user", user, |name| uzers::get_user_by_name(name).map(|user| user.uid()))?;
    let group = look_up("group", group, |name| uzers::get_group_by_name(name).map(|group| group.gid()))?;
    match (user, group) {
        (None, None) => Err("nobody is named: USER, USER:GROUP or :GROUP".to_owned()),
        _ => Ok(Owner { user, group }),
    }
}

fn look_up(what: &str, name: &str, by_name: impl Fn(&str) -> Option<u32>) -> Result<Option<u32>, String> {
    match (name, name.parse()) {
        ("", _) => Ok(None),
        (_, Ok(number)) => Ok(Some(number)),
        _ => by_name(name).map(Some).ok_or_else(|| format!("there is no {what} named {name}")),
    }
}

#[cfg(test)]
mod tests {
    use super::{Owner, mode, owner, parse};
    use engine::control::options::Listener;

    #[test]
    fn addresses() {
        assert_eq!(parse("[::1]:10809"), Ok(Listener::Tcp("[::1]:10809".into())));
        assert_eq!(parse("vsock:*:10809"), Ok(Listener::Vsock { cid: None, port: 10809 }));
        assert_eq!(parse("vsock:2:7"), Ok(Listener::Vsock { cid: Some(2), port: 7 }));
        for wrong in ["vsock:", "vsock:2", "vsock::7", "vsock:x:7", "vsock:2:-1", "vsock:2:4294967296"] {
            assert!(parse(wrong).is_err_and(|why| why.contains("vsock:CID:PORT")), "{wrong}");
        }
    }

    #[test]
    fn modes_and_owners() {
        assert_eq!((mode("660"), mode("0600"), mode("0")), (Ok(0o660), Ok(0o600), Ok(0)));
        assert!(["", "8", "1777", "rw", "-1"].iter().all(|wrong| mode(wrong).is_err()));
        assert_eq!(owner("0"), Ok(Owner { user: Some(0), group: None }));
        assert_eq!(owner("root:7"), Ok(Owner { user: Some(0), group: Some(7) }));
        assert_eq!(owner(":root"), Ok(Owner { user: None, group: Some(0) }));
        assert_eq!(owner("nobody-of-that-name"), Err("there is no user named nobody-of-that-name".into()));
        assert!(owner("").is_err() && owner(":").is_err());
    }
}
