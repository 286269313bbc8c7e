//! A real terminal: a pseudo-terminal with a shell that has job control, driven by keys.

// Each test uses a part of it.
#![allow(dead_code)]

use crate::common::{Place, have};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long things on the terminal may take.
const PATIENCE: Duration = Duration::from_secs(180);
/// The shell's prompt.
const PROMPT: &str = "next> ";
pub const CTRL_C: u8 = 3;
pub const CTRL_Z: u8 = 26;
pub const CTRL_BACKSLASH: u8 = 28;

/// A terminal in which bash runs.
pub struct Terminal {
    /// util-linux's `script`, which holds the other side of the pseudo-terminal.
    script: Child,
    keys: ChildStdin,
    screen: Arc<Mutex<String>>,
    /// How much of the screen has been looked at.
    seen: usize,
}

impl Terminal {
    /// Opens one in the test's folder; nothing, with a word, where `script` or `bash` is not installed.
    pub fn open(place: &Place) -> Option<Self> {
        if !have("script") || !have("bash") {
            return None;
        }
        // Free of any launcher's variables.
        let clean = place.regatta(&[]);
        let mut script = Command::new("script");
        // What a command leaves on the line must not be taken for the prompt, nor wrapped lines for others.
        let profile = format!("PS1='{PROMPT}'\nstty cols 120\nbind 'set enable-bracketed-paste off'\n");
        std::fs::write(place.path("shell-profile"), profile).unwrap();
        script.args(["-q", "-f", "-e", "-c", "exec bash --rcfile shell-profile -i", "/dev/null"]);
        for (key, value) in clean.get_envs() {
            if value.is_none() {
                script.env_remove(key);
            }
        }
        script.env("TERM", "xterm").env_remove("PROMPT_COMMAND");
        script
            .current_dir(place.path(""))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        let mut script = script.spawn().unwrap();
        let (keys, mut output) = (script.stdin.take().unwrap(), script.stdout.take().unwrap());
        let screen = Arc::<Mutex<String>>::default();
        let written = screen.clone();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(read) = output.read(&mut bytes) {
                if read == 0 {
                    break;
                }
                written.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..read]));
            }
        });
        let mut terminal = Self { script, keys, screen, seen: 0 };
        terminal.wait_for(PROMPT);
        Some(terminal)
    }

    /// Types a line.
    pub fn type_line(&mut self, line: &str) {
        self.seen = self.screen().len();
        self.keys.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Presses a key.
    pub fn press(&mut self, key: u8) {
        self.keys.write_all(&[key]).unwrap();
    }

    /// Waits until `ready`, which is given what is new on the screen.
    pub fn until(&self, what: &str, mut ready: impl FnMut(&str) -> bool) {
        let begun = Instant::now();
        while !ready(self.screen.lock().unwrap().get(self.seen..).unwrap_or_default()) {
            assert!(begun.elapsed() < PATIENCE, "waited too long for {what}\n{}", self.screen());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until `text` is on the screen, after what has been waited for before.
    pub fn wait_for(&mut self, text: &str) {
        let mut found = None;
        self.until(&format!("{text:?}"), |new| {
            found = new.find(text);
            found.is_some()
        });
        self.seen += found.unwrap() + text.len();
    }

    /// Waits for the prompt and asks for the exit code of the last command.
    pub fn exit_code(&mut self) -> i32 {
        self.wait_for(PROMPT);
        self.type_line("echo \"ended with $?.\"");
        // What is typed is shown, too, but with `$?`.
        let mut code = None;
        self.until("an exit code", |new| {
            code = new.split("ended with ").skip(1).find_map(|rest| rest.split_once('.')?.0.parse().ok());
            code.is_some()
        });
        self.wait_for(PROMPT);
        code.unwrap()
    }

    /// Runs a short command.
    pub fn run(&mut self, line: &str) {
        self.type_line(line);
        self.wait_for(PROMPT);
    }

    /// All that has been on the screen.
    pub fn screen(&self) -> String {
        self.screen.lock().unwrap().clone()
    }

    /// The process id of the shell.
    pub fn shell(&self) -> u32 {
        let children = format!("/proc/{0}/task/{0}/children", self.script.id());
        std::fs::read_to_string(children).unwrap().split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Closes the window.
    pub fn close(mut self) {
        self.script.kill().unwrap();
        self.script.wait().unwrap();
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.script.kill();
        let _ = self.script.wait();
    }
}

/// A process that a test has started, directly or not.
pub struct Process {
    pub pid: u32,
    pub parent: u32,
    pub group: u32,
    environment: Vec<u8>,
}

impl Process {
    /// Its rank, where a launcher has made it one.
    pub fn rank(&self) -> Option<usize> {
        let variables: Vec<&[u8]> = self.environment.split(|byte| *byte == 0).collect();
        ["RANK=", "OMPI_COMM_WORLD_RANK="].iter().find_map(|name| {
            let value = variables.iter().find_map(|variable| variable.strip_prefix(name.as_bytes()))?;
            std::str::from_utf8(value).ok()?.parse().ok()
        })
    }
}

/// The processes, not yet ended, that have `variable` in their environment.
pub fn processes_with(variable: &str) -> Vec<Process> {
    let mut found = vec![];
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let path = entry.path();
        let environment = std::fs::read(path.join("environ")).unwrap_or_default();
        let Some((state, parent, group)) = stat(&path) else { continue };
        let has = environment.split(|byte| *byte == 0).any(|own| own == variable.as_bytes());
        if has && state != "Z" && state != "X" {
            found.push(Process { pid, parent, group, environment });
        }
    }
    found
}

fn stat(path: &Path) -> Option<(String, u32, u32)> {
    let stat = std::fs::read_to_string(path.join("stat")).ok()?;
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
    let mut next = || fields.next();
    Some((next()?.into(), next()?.parse().ok()?, next()?.parse().ok()?))
}
