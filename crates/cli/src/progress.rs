//! Progress of downloads and copies: a bar on a terminal, at most a line a stage elsewhere.
use crate::messages;
use image::{Progress, Stage, Step};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::Duration;

/// How often the bar moves while nothing is reported.
const TICK: Duration = Duration::from_millis(200);

/// Shows steps on standard error.
#[derive(Debug, Default)]
pub struct Bar {
    stage: Option<Stage>,
    bar: Option<ProgressBar>,
}

impl Bar {
    fn begin(&mut self, step: &Step) {
        self.finish();
        self.stage = Some(step.stage.clone());
        if !std::io::stderr().is_terminal() {
            messages::say(&step.stage.to_string());
            return;
        }
        let bar = ProgressBar::new_spinner().with_style(style("{spinner} {msg} {elapsed}"));
        // Some stages report once and then take long.
        bar.enable_steady_tick(TICK);
        self.bar = Some(bar.with_message(step.stage.to_string()));
    }

    /// Takes the bar away, before something else is said.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// A template of this file; one with a mistake shows as the default bar.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl Progress for Bar {
    fn report(&mut self, step: &Step) {
        if self.stage.as_ref() != Some(&step.stage) {
            self.begin(step);
        }
        if let Some(bar) = &self.bar {
            // A total may become known only on the way.
            if let Some(total) = step.total
                && bar.length() != Some(total)
            {
                bar.set_style(style(if step.stage.counts_bytes() {
                    "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}"
                } else {
                    "{msg} [{bar:30}] {percent}%"
                }));
                bar.set_length(total);
            }
            bar.set_position(step.done);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.finish();
    }
}

/// A bar for one piece of work on bytes; shown on a terminal only.
#[derive(Debug)]
pub struct ByteBar(Option<ProgressBar>);

impl ByteBar {
    /// A bar that says what is done.
    pub fn new(what: String) -> Self {
        let template = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}";
        let bar = || ProgressBar::new(0).with_style(style(template)).with_message(what);
        Self(std::io::stderr().is_terminal().then(bar))
    }

    /// Shows how far it is.
    pub fn set(&self, done: u64, total: u64) {
        if let Some(bar) = &self.0 {
            bar.set_length(total);
            bar.set_position(done);
        }
    }
}

impl Drop for ByteBar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
