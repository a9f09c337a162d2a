//! The engines that the tests of this crate run: the one place that names them.
use crate::limits::limit_of;
use engine::{Engine, EngineError};
use kvm::{HostKvm, KvmEngine};
use soft::{Options, SoftEngine};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::str::FromStr;
use std::sync::Arc;

/// An engine that tests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineUnderTest {
    /// The software engine.
    Soft,
    /// KVM, with the software engine for what it does not know.
    Kvm,
}

impl EngineUnderTest {
    /// Makes it.
    ///
    /// # Errors
    /// Fails where the host cannot give what the engine needs.
    pub fn make(self) -> Result<Arc<dyn Engine>, EngineError> {
        Ok(match self {
            Self::Soft => Arc::new(SoftEngine::new()?),
            Self::Kvm => {
                Arc::new(KvmEngine::with_companion(|| Ok(Arc::new(SoftEngine::companion()?)))?)
            }
        })
    }

    /// Its name on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Soft => "soft",
            Self::Kvm => "kvm",
        }
    }

    /// Makes it, told to keep arithmetic flags exact also where the guest could not tell.
    ///
    /// # Errors
    /// As [`Self::make`].
    pub fn make_precise(self) -> Result<Arc<dyn Engine>, EngineError> {
        let options = Options { precise_flags: true, ..Options::default() };
        match self {
            Self::Soft => Ok(Arc::new(SoftEngine::with_options(options)?)),
            Self::Kvm => self.make(),
        }
    }

    /// The engine, or `None` where this host has no KVM: the message must then say so, and how to
    /// go on.
    ///
    /// # Panics
    /// Where the message does not.
    pub fn make_or_explain(self) -> Option<Arc<dyn Engine>> {
        match self.make() {
            Ok(engine) => Some(engine),
            Err(error) => {
                let text = error.to_string();
                assert!(self == Self::Kvm, "the software engine needs nothing: {text}");
                assert!(text.contains("kvm") || text.contains("KVM"), "{text}");
                assert!(text.contains("--engine soft"), "{text}");
                println!("There is no KVM here, and the engine says so: {text}");
                None
            }
        }
    }

    /// How many of `rounds` the engine manages in the time that a test may take. KVM without
    /// hardware behind it needs about 1 µs for an instruction of the system's, and far more for
    /// one that the software engine completes.
    pub fn rounds(self, rounds: u32) -> u32 {
        let slow = self == Self::Kvm && !HostKvm::probe().is_hardware_backed();
        if slow { (rounds / 100).max(1) } else { rounds }
    }
}

impl FromStr for EngineUnderTest {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "soft" => Ok(Self::Soft),
            "kvm" => Ok(Self::Kvm),
            _ => Err(format!("there is no engine {name}; the engines are soft and kvm")),
        }
    }
}

/// Runs a test on an engine. One that this host's KVM is known not to pass must fail as its entry
/// in the list says.
///
/// # Panics
/// Where the test fails, or is on the list and does not fail in that way.
pub fn run(engine: EngineUnderTest, name: &str, test: fn(EngineUnderTest)) {
    let Some(made) = engine.make_or_explain() else { return };
    let limit = match engine {
        EngineUnderTest::Soft => None,
        EngineUnderTest::Kvm => limit_of(name, &made.host_cpu()),
    };
    let Some(limit) = limit else { return test(engine) };
    match catch_unwind(AssertUnwindSafe(|| test(engine))) {
        Ok(()) => panic!("{name} passes on this host's KVM; take it off the list in limits.rs"),
        Err(payload) if message(payload.as_ref()).contains(limit.shows) => {
            println!("{name} fails on this host's KVM as is known: {}", limit.reason);
        }
        Err(payload) => {
            eprintln!("{name} was to fail with {:?}, because {}", limit.shows, limit.reason);
            resume_unwind(payload)
        }
    }
}

fn message(payload: &dyn Any) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or_default()
}

/// Makes a test of each engine: `on_each_engine!(a_sentence, |engine| { … })` becomes
/// `a_sentence::on_soft` and `a_sentence::on_kvm`. The closure is given an [`EngineUnderTest`].
#[macro_export]
macro_rules! on_each_engine {
    ($name:ident, $test:expr) => {
        mod $name {
            #[allow(
                unused_imports,
                reason = "each test uses its own part of the file's names"
            )]
            use super::*;
            const TEST: fn($crate::under_test::EngineUnderTest) = $test;

            #[test]
            fn on_soft() {
                let engine = $crate::under_test::EngineUnderTest::Soft;
                $crate::under_test::run(engine, stringify!($name), TEST);
            }
            #[test]
            fn on_kvm() {
                let engine = $crate::under_test::EngineUnderTest::Kvm;
                $crate::under_test::run(engine, stringify!($name), TEST);
            }
        }
    };
}
