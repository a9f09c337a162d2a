//! The distribution's programs that a fetch runs.

use crate::ImageError;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// How often a running program's progress is looked at.
const TICK: Duration = Duration::from_millis(50);

/// The longest line that is taken whole, in bytes.
const LONGEST_LINE: u64 = 64 << 10;

/// Where `apt-get`, `dpkg-deb`, `mmdebstrap` and the like are found, and with what rights they
/// run.
#[derive(Clone, Debug)]
pub struct Programs {
    folder: Option<PathBuf>,
    root: bool,
}

impl Programs {
    /// Those of this machine, by `PATH`, run as the present user.
    #[must_use]
    pub fn of_this_machine() -> Self {
        Self { folder: None, root: rustix::process::geteuid().is_root() }
    }

    /// Those in `folder`; `root` says whether they may refresh the machine's package lists.
    #[must_use]
    pub fn in_folder(folder: impl Into<PathBuf>, root: bool) -> Self {
        Self { folder: Some(folder.into()), root }
    }

    /// Whether the programs may change the machine.
    pub(crate) fn root(&self) -> bool {
        self.root
    }

    /// Runs a program to its end and takes its output.
    pub(crate) fn output(
        &self,
        program: &'static str,
        arguments: &[&str],
    ) -> Result<Output, ImageError> {
        let mut command = self.command(program, arguments);
        command.output().map_err(|source| not_run(program, source))
    }

    /// Starts a program whose standard output is read through the child's pipe.
    pub(crate) fn reader(
        &self,
        program: &'static str,
        arguments: &[&str],
    ) -> Result<Child, ImageError> {
        let mut command = self.command(program, arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        command.spawn().map_err(|source| not_run(program, source))
    }

    /// Runs a program in `folder` and calls `tick` now and then until it ends. Returns its
    /// status and what it wrote to standard error.
    pub(crate) fn watch(
        &self,
        program: &'static str,
        arguments: &[&str],
        folder: &Path,
        mut tick: impl FnMut(),
    ) -> Result<(ExitStatus, String), ImageError> {
        let mut command = self.command(program, arguments);
        command.current_dir(folder).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|source| not_run(program, source))?;
        let mut stderr = child.stderr.take();
        let (sender, receiver) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut text = Vec::new();
                if let Some(pipe) = stderr.as_mut() {
                    // What arrived before a read error is still worth showing.
                    let _ = pipe.read_to_end(&mut text);
                }
                // The receiver waits for exactly this message.
                let _ = sender.send(String::from_utf8_lossy(&text).into_owned());
            });
            let text = loop {
                match receiver.recv_timeout(TICK) {
                    Ok(text) => break text,
                    Err(RecvTimeoutError::Timeout) => tick(),
                    Err(RecvTimeoutError::Disconnected) => break String::new(),
                }
            };
            tick();
            let status = child.wait().map_err(|source| ImageError::Run { program, source })?;
            Ok((status, text))
        })
    }

    /// Runs a program in `folder`, with more in its environment, and calls `take` for each line
    /// that it writes to standard output or error. Returns its status.
    pub(crate) fn lines(
        &self,
        program: &'static str,
        arguments: &[&str],
        environment: &[(&str, String)],
        folder: &Path,
        mut take: impl FnMut(&str),
    ) -> Result<ExitStatus, ImageError> {
        let failed = |source| ImageError::Run { program, source };
        let (reader, writer) = io::pipe().map_err(failed)?;
        let mut command = self.command(program, arguments);
        command.current_dir(folder).envs(environment.iter().map(|(name, value)| (name, value)));
        command.stdout(writer.try_clone().map_err(failed)?).stderr(writer);
        let mut child = command.spawn().map_err(|source| not_run(program, source))?;
        // The command holds the pipe's other end, which must close for the reading to end.
        drop(command);
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        loop {
            line.clear();
            let length = (&mut reader).take(LONGEST_LINE).read_until(b'\n', &mut line);
            if length.map_err(failed)? == 0 {
                break;
            }
            take(String::from_utf8_lossy(&line).trim_end());
        }
        child.wait().map_err(failed)
    }

    /// A command in the C locale (its output is read here) that cannot ask questions.
    fn command(&self, program: &'static str, arguments: &[&str]) -> Command {
        let path = match &self.folder {
            Some(folder) => folder.join(program),
            None => PathBuf::from(program),
        };
        let mut command = Command::new(path);
        command.args(arguments).env("LC_ALL", "C").env_remove("LANGUAGE").stdin(Stdio::null());
        command
    }
}

fn not_run(program: &'static str, source: io::Error) -> ImageError {
    match source.kind() {
        io::ErrorKind::NotFound => ImageError::NoProgram { program },
        _ => ImageError::Run { program, source },
    }
}
