//! Lists on the command line: sizes, and names or `all`.

use regatta_comm::DType;
use std::fmt::Display;
use std::str::FromStr;

/// A name, or all names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice<T> {
    All,
    One(T),
}

/// Reads a name or `all`.
pub fn choice<T: FromStr<Err: Display>>(text: &str) -> Result<Choice<T>, String> {
    match text.trim() {
        "all" => Ok(Choice::All),
        name => name.parse().map(Choice::One).map_err(|error: T::Err| error.to_string()),
    }
}

/// The names of a list without repetitions; `None` if `all` is among them.
pub fn names<T: Copy + PartialEq>(choices: &[Choice<T>]) -> Option<Vec<T>> {
    let mut found = vec![];
    for choice in choices {
        match choice {
            Choice::All => return None,
            Choice::One(name) if found.contains(name) => {}
            Choice::One(name) => found.push(*name),
        }
    }
    Some(found)
}

/// Reads a number of bytes; K, M and G multiply by 1024.
pub fn bytes(text: &str) -> Result<usize, String> {
    let text = text.trim();
    let (digits, factor) = match text.char_indices().next_back() {
        Some((end, 'K')) => (&text[..end], 1 << 10),
        Some((end, 'M')) => (&text[..end], 1 << 20),
        Some((end, 'G')) => (&text[..end], 1 << 30),
        _ => (text, 1usize),
    };
    let count: usize =
        digits.parse().map_err(|_| format!("{text:?} is not a size; write 4096, 16K or 4M"))?;
    count.checked_mul(factor).ok_or_else(|| format!("{text} is more than memory can be"))
}

/// Checks that every size is a whole number of elements.
pub fn check_sizes(sizes: &[usize], dtype: DType) -> Result<(), String> {
    let each = dtype.bytes();
    match sizes.iter().find(|size| !size.is_multiple_of(each)) {
        Some(size) => Err(format!("size {size}: must be a multiple of {each} bytes for {dtype} data")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::op::Op;
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, expected) in
            [("0", 0), ("4", 4), (" 16K", 16 << 10), ("3M", 3 << 20), ("1G", 1 << 30), ("4096", 4096)]
        {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for bad in ["", "K", "4k", "-1", "1.5M", "4T", "é", "99999999999999G"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
        assert_eq!(check_sizes(&[4, 8], DType::F32), Ok(()));
        assert!(check_sizes(&[4, 6], DType::F32).unwrap_err().contains("size 6: must be a multiple of 4"));
        assert_eq!(check_sizes(&[6], DType::BF16), Ok(()));
    }

    #[test]
    fn names_are_read() {
        assert_eq!(choice::<Op>("all"), Ok(Choice::All));
        assert_eq!(choice("send_recv"), Ok(Choice::One(Op::SendRecv)));
        assert!(choice::<Op>("fly").unwrap_err().contains("all_to_all"));
        assert_eq!(names(&[Choice::One(1), Choice::One(2), Choice::One(1)]), Some(vec![1, 2]));
        assert_eq!(names(&[Choice::One(1), Choice::All]), None);
    }
}
