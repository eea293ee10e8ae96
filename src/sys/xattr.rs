//! Extended attributes of files: getxattr(2).

use std::ffi::CStr;
use std::io;

use nix::errno::Errno;

/// An attribute of what lies at a path, up to 64 bytes of it.
pub fn read(path: &CStr, name: &CStr) -> io::Result<Vec<u8>> {
    let mut value = [0_u8; 64];
    // SAFETY: both strings end with NUL; at most so many bytes are written as the buffer has.
    let length = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    let length = usize::try_from(Errno::result(length)?).unwrap_or(0);
    Ok(value[..length].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_is_not_there_is_an_error() {
        let path = std::ffi::CString::new(env!("CARGO_MANIFEST_DIR")).unwrap();
        let missing = read(&path, c"user.zddsup-has-none").unwrap_err().raw_os_error();
        assert!([libc::ENODATA, libc::EOPNOTSUPP].contains(&missing.unwrap()), "{missing:?}");
        let nowhere = read(c"/nowhere at all", c"user.delegate").unwrap_err();
        assert_eq!(nowhere.kind(), io::ErrorKind::NotFound);
    }
}
