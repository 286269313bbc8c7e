//! Text and tokenizers as users have them: replaced files, other encodings, folders, full disks, file systems without locks.

mod common;

use common::{Place, fail, have, said, succeed};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The folders of prepared text in `cache`.
fn prepared(cache: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(cache).into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> =
        entries.map(|entry| entry.path()).filter(|path| path.join("meta.json").exists()).collect();
    folders.sort();
    folders
}

/// The tokens of a token file with two bytes each.
fn tokens(path: &Path) -> Vec<u16> {
    let bytes = fs::read(path).unwrap();
    bytes[32..].chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect()
}

/// What `regatta data text FILE` with bytes as tokens makes of a file: its tokens as text.
fn learned(place: &Place, file: &str) -> String {
    let cache = place.path(&format!("cache-{}", file.replace('/', "-")));
    let cache = cache.to_str().unwrap();
    succeed(&mut place.regatta(&[
        "data",
        "text",
        file,
        "--tokenizer",
        "bytes",
        "--val-fraction",
        "0.5",
        "--cache",
        cache,
    ]));
    let folders = prepared(Path::new(cache));
    assert_eq!(folders.len(), 1);
    let bytes = ["train.tok", "val.tok"].map(|name| tokens(&folders[0].join(name))).concat();
    String::from_utf8(bytes.iter().map(|&token| token as u8).collect()).unwrap()
}

#[test]
fn a_text_of_equal_size_and_time_is_another_text() {
    let place = Place::new();
    let (text, other, kept) = (place.path("text.txt"), place.path("other.txt"), place.path("kept.txt"));
    fs::write(&text, "one two three ".repeat(50)).unwrap();
    fs::write(&other, "two one three ".repeat(50)).unwrap();
    // The same time for both, which cp -p keeps, as tar and layers of images do.
    let touch = |path: &Path| Command::new("touch").args(["-d", "2020-01-01"]).arg(path).status().unwrap();
    assert!(touch(&text).success() && touch(&other).success());
    let prepare = || {
        let output = succeed(&mut place.regatta(&[
            "data",
            "text",
            "text.txt",
            "--tokenizer",
            "bytes",
            "--val-fraction",
            "0.5",
        ]));
        (prepared(&place.path("data")), said(&output))
    };
    let (first, told) = prepare();
    assert!(told.contains("preparing data/text-"), "{told}");
    assert_eq!(prepare().0, first, "the same text is prepared once");
    assert!(!prepare().1.contains("preparing"));
    fs::copy(&text, &kept).unwrap();
    assert!(Command::new("cp").arg("-p").args([&other, &text]).status().unwrap().success());
    let (both, told) = prepare();
    assert_eq!(both.len(), 2, "{told}");
    assert!(told.contains("1 folder(s) of other versions") && told.contains("regatta data clean"), "{told}");
    let new = both.iter().find(|folder| !first.contains(folder)).unwrap();
    assert_eq!(tokens(&new.join("train.tok"))[..3], [b't', b'w', b'o'].map(u16::from));
    // A file that is moved or copied is the same text.
    fs::create_dir(place.path("elsewhere")).unwrap();
    fs::copy(&other, place.path("elsewhere/text.txt")).unwrap();
    succeed(&mut place.regatta(&[
        "data",
        "text",
        "elsewhere/text.txt",
        "--tokenizer",
        "bytes",
        "--val-fraction",
        "0.5",
    ]));
    assert_eq!(prepared(&place.path("data")), both);
}

#[test]
fn a_tokenizer_that_was_replaced_is_another_tokenizer() {
    let place = Place::new();
    gpt2_files(&place.path("tok"), &["a", "b"]);
    fs::write(place.path("text.txt"), "ab ab ".repeat(40)).unwrap();
    let prepare = || {
        succeed(&mut place.regatta(&["data", "text", "text.txt", "--tokenizer-path", "tok"]));
        prepared(&place.path("data")).len()
    };
    assert_eq!((prepare(), prepare()), (1, 1));
    gpt2_files(&place.path("tok"), &["Ġ", "a"]);
    assert_eq!(prepare(), 2);
}

/// Files as GPT-2's: a token for every byte, one merge, `<|endoftext|>`.
fn gpt2_files(folder: &Path, merge: &[&str; 2]) {
    fs::create_dir_all(folder).unwrap();
    let mut shifted = '\u{100}'..;
    let bytes = (0..=255u8).map(|byte| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        _ => shifted.next().unwrap(),
    });
    let vocab = bytes.map(String::from).chain([merge.concat(), "<|endoftext|>".into()]).zip(0..);
    let vocab: serde_json::Map<String, serde_json::Value> =
        vocab.map(|(token, id)| (token, serde_json::Value::from(id))).collect();
    fs::write(folder.join("vocab.json"), serde_json::to_string(&vocab).unwrap()).unwrap();
    fs::write(folder.join("merges.txt"), format!("#version: 0.2\n{}\n", merge.join(" "))).unwrap();
}

#[test]
fn byte_order_marks_and_utf16_are_understood() {
    let place = Place::new();
    let text = "grüß dich, 世界!\r\n".repeat(20);
    let utf16 = |mark: bool, unit: fn(u16) -> [u8; 2]| -> Vec<u8> {
        let units = mark.then_some(0xfeff).into_iter().chain(text.encode_utf16());
        units.flat_map(unit).collect()
    };
    for (name, bytes) in [
        ("plain.txt", text.clone().into_bytes()),
        ("mark.txt", format!("\u{feff}{text}").into_bytes()),
        ("windows.txt", utf16(true, u16::to_le_bytes)),
        ("big.txt", utf16(true, u16::to_be_bytes)),
    ] {
        fs::write(place.path(name), bytes).unwrap();
        assert_eq!(learned(&place, name), text, "{name}");
    }
    fs::write(
        place.path("bare.txt"),
        "plain letters\n".repeat(9).encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<_>>(),
    )
    .unwrap();
    let problem = fail(&mut place.regatta(&["data", "text", "bare.txt"]));
    assert!(problem.contains("bare.txt") && problem.contains("iconv -f UTF-16LE"), "{problem}");
}

#[test]
#[cfg(unix)]
fn paths_are_bytes() {
    use std::os::unix::ffi::OsStrExt;
    let place = Place::new();
    let (text, cache) = ("t\u{fffd}.txt", "cache");
    let name = std::ffi::OsStr::from_bytes(b"t\xff.txt");
    fs::copy(place.path("text.txt"), place.path("").join(name)).unwrap();
    // What a lossy conversion would find.
    fs::write(place.path(text), "x").unwrap();
    let mut data = place.regatta(&["data", "text", "--tokenizer", "bytes", "--cache", cache]);
    succeed(data.arg(name));
    let folders = prepared(&place.path(cache));
    assert!(tokens(&folders[0].join("train.tok")).len() > 10_000);
}

#[test]
fn text_of_another_encoding_is_refused_with_its_place() {
    let place = Place::new();
    fs::write(place.path("latin1.txt"), b"one\ntwo\nth\xf6ree\n".repeat(9)).unwrap();
    let problem = fail(&mut place.regatta(&["data", "text", "latin1.txt"]));
    for wanted in ["latin1.txt", "byte 0xf6 at offset 10 (line 3)", "iconv"] {
        assert!(problem.contains(wanted), "{wanted}: {problem}");
    }
    fs::write(place.path("table.parquet"), [b"PAR1".as_slice(), &[0xff; 99]].concat()).unwrap();
    let problem = fail(&mut place.regatta(&["data", "text", "table.parquet"]));
    assert!(problem.contains("Parquet"), "{problem}");
}

#[test]
fn files_of_a_folder_that_are_left_out_are_named() {
    let place = Place::new();
    fs::create_dir(place.path("texts")).unwrap();
    for n in 0..6 {
        fs::write(place.path(&format!("texts/{n}.txt")), format!("document {n} ").repeat(30)).unwrap();
    }
    fs::write(place.path("texts/photo.jpg"), [0xff, 0xd8, 0xff, 0xe0]).unwrap();
    fs::write(place.path("texts/café.txt"), b"caf\xe9 \n".repeat(9)).unwrap();
    let data = || said(&succeed(&mut place.regatta(&["data", "text", "texts", "--tokenizer", "bytes"])));
    let told = data();
    for wanted in ["2 of 8 files are skipped", "photo.jpg", "café.txt", "offset 3 (line 1)"] {
        assert!(told.contains(wanted), "{wanted}: {told}");
    }
    // Whoever uses the prepared data later hears it too.
    let again = data();
    assert!(again.contains("2 of 8 files are skipped") && !again.contains("preparing"), "{again}");
}

#[test]
fn records_and_tables_are_taken_as_text_with_a_warning() {
    let place = Place::new();
    for (name, wanted) in [("a.jsonl", "braces"), ("b.json", "braces"), ("c.csv", "separators")] {
        fs::write(place.path(name), "{\"text\": \"some, words\"}\n".repeat(40)).unwrap();
        let told = said(&succeed(&mut place.regatta(&["data", "text", name, "--tokenizer", "bytes"])));
        assert!(
            told.contains(&format!("warning: {name}: read as plain text")) && told.contains(wanted),
            "{told}"
        );
    }
    let told = said(&succeed(&mut place.regatta(&["data", "text", "text.txt", "--tokenizer", "bytes"])));
    assert!(!told.contains("warning"), "{told}");
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing_behind() {
    let place = Place::new();
    let disk = place.path("disk");
    fs::create_dir(&disk).unwrap();
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"]).arg(&disk).output();
    if !mount.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: a small file system cannot be mounted here");
        return;
    }
    fs::write(place.path("large.txt"), "some words of a text\n".repeat(20_000)).unwrap();
    let mut data =
        place.regatta(&["data", "text", "large.txt", "--tokenizer", "bytes", "--cache", "disk/data"]);
    let problem = fail(&mut data);
    let left: Vec<PathBuf> =
        prepared(&disk.join("data")).into_iter().chain(glob(&disk.join("data"), "tmp")).collect();
    // Before anything that may panic, so that the folder can be removed.
    assert!(Command::new("umount").arg(&disk).status().unwrap().success());
    assert!(problem.contains("train.tok") && problem.contains("No space left"), "{problem}");
    assert_eq!(left, Vec::<PathBuf>::new());
}

/// Files below `folder` whose name ends in `.end`.
fn glob(folder: &Path, end: &str) -> Vec<PathBuf> {
    let mut found = vec![];
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(glob(&path, end));
        } else if path.extension().is_some_and(|extension| extension == end) {
            found.push(path);
        }
    }
    found
}

/// Runs a program whose every flock(2) fails with ENOLCK, as on network file systems without a lock service.
const NO_LOCKS: &str = r#"
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
FLOCK, ENOLCK = 73, 37
code = [(0x20, 0, 0, 0), (0x15, 0, 1, FLOCK), (0x06, 0, 0, 0x00050000 | ENOLCK), (0x06, 0, 0, 0x7fff0000)]
filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(filters))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
os.execv(sys.argv[1], sys.argv[1:])
"#;

#[test]
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn a_file_system_without_locks_is_used_with_a_warning() {
    if !have("python3") {
        return;
    }
    let place = Place::new();
    // Several at once: none may find half of what another writes.
    let start = || {
        let plain = place.regatta(&["data", "text", "text.txt", "--tokenizer", "bpe", "--vocab-size", "300"]);
        let mut command = Command::new("python3");
        command.args(["-c", NO_LOCKS]).arg(plain.get_program()).args(plain.get_args());
        command
            .current_dir(place.path(""))
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        command.spawn().unwrap()
    };
    let started: Vec<_> = (0..4).map(|_| start()).collect();
    let outputs: Vec<_> = started.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    for output in &outputs {
        assert!(output.status.success(), "{}", said(output));
    }
    assert!(outputs.iter().any(|output| said(output).contains("cannot be locked")), "{}", said(&outputs[0]));
    assert!(said(&outputs[0]).contains("training tokens"));
    assert_eq!(prepared(&place.path("data")).len(), 1);
    assert_eq!(glob(&place.path("data"), "tmp"), Vec::<PathBuf>::new());
    succeed(&mut place.regatta(&["data", "text", "text.txt", "--tokenizer", "bpe", "--vocab-size", "300"]));
}

#[test]
fn prepared_text_is_listed_and_cleaned() {
    let place = Place::new();
    let data = |what: &[&str]| said(&succeed(&mut place.regatta(&[&["data"], what].concat())));
    assert!(data(&["list"]).contains("no prepared text"));
    data(&["text", "text.txt", "--tokenizer", "bytes"]);
    data(&["text", "text.txt", "--tokenizer", "chars"]);
    fs::write(place.path("text.txt"), "another text \n".repeat(100)).unwrap();
    data(&["text", "text.txt", "--tokenizer", "bytes"]);
    // One that was ended in the middle, and what only looks like one.
    let half = place.path("data/text-0123456789ab");
    fs::create_dir(&half).unwrap();
    fs::write(half.join("lock"), "").unwrap();
    fs::create_dir(place.path("data/mine-0123456789ab")).unwrap();
    fs::write(place.path("data/mine-0123456789ab/notes.txt"), "keep").unwrap();
    let list = data(&["list"]);
    for wanted in ["out of date", "incomplete", "M tokens", "4 folder(s)", "text.txt"] {
        assert!(list.contains(wanted), "{wanted}: {list}");
    }
    let folders = prepared(&place.path("data"));
    let dry = data(&["clean", "--dry-run"]);
    assert!(dry.contains("2 folder(s)") && dry.contains("would be removed"), "{dry}");
    assert_eq!(prepared(&place.path("data")), folders);
    let told = data(&["clean"]);
    assert!(told.contains("2 folder(s)") && told.contains("0123456789ab"), "{told}");
    assert_eq!(prepared(&place.path("data")).len(), 2);
    assert!(data(&["clean"]).contains("0 folder(s)"));
    assert!(data(&["clean", "--unused-for", "1"]).contains("0 folder(s)"));
    assert!(data(&["clean", "--all"]).contains("2 folder(s)"));
    assert_eq!(fs::read_to_string(place.path("data/mine-0123456789ab/notes.txt")).unwrap(), "keep");
    // What was removed is prepared again.
    assert!(data(&["text", "text.txt", "--tokenizer", "bytes"]).contains("preparing"));
}

#[test]
fn documents_are_joined_with_the_end_of_text() {
    let place = Place::new();
    gpt2_files(&place.path("tok"), &["a", "b"]);
    fs::create_dir(place.path("texts")).unwrap();
    for (name, text) in [("1", "ab"), ("2", "c"), ("3", "ddd")] {
        fs::write(place.path(&format!("texts/{name}.txt")), text).unwrap();
    }
    let data = |path: &str, more: &[&str]| {
        let arguments = ["data", "text", path, "--cache", path, "--val-fraction", "0"];
        let output = place.regatta(&[&arguments, more].concat()).output().unwrap();
        // There are fewer tokens held out than a block has, which is another matter.
        let folders = prepared(&place.path(path));
        assert_eq!(folders.len(), 1, "{}", said(&output));
        tokens(&folders[0].join("train.tok"))
    };
    let end = 257;
    let found = data("texts", &["--tokenizer-path", "tok"]);
    assert_eq!(found.iter().filter(|&&token| token == end).count(), 2);
    assert_eq!((found[0], found[1], found[3]), (256, end, end));
    assert_eq!(found.len(), 1 + 1 + 1 + 1 + 3);
}

#[test]
fn generation_stops_at_the_end_of_text() {
    let place = Place::new();
    gpt2_files(&place.path("tok"), &["a", "b"]);
    fs::create_dir(place.path("texts")).unwrap();
    for n in 0..200 {
        fs::write(place.path(&format!("texts/{n}.txt")), format!("{n}:stop")).unwrap();
    }
    let sets = ["data.path=texts", "data.tokenizer=bpe", "data.tokenizer_path=tok", "train.steps=150"];
    let mut arguments = vec!["train", "small.toml", "--out", "run"];
    sets.iter().for_each(|set| arguments.extend(["--set", set]));
    succeed(&mut place.regatta(&arguments));
    let output = succeed(&mut place.regatta(&[
        "generate",
        "run",
        "--prompt",
        "17:st",
        "--temperature",
        "0",
        "--tokens",
        "100",
    ]));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "17:stop\n", "{}", said(&output));
}
