//! The CPU that a machine shows its guest.
use crate::error::VmmError;
use arch::{Baseline, CpuModel};
use engine::Engine;
use std::fmt;
use std::str::FromStr;

/// Which CPU model the guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum CpuChoice {
    /// All that the engine offers on this host.
    #[default]
    Host,
    /// A level that is the same everywhere.
    Baseline(Baseline),
}

/// A text that is not the name of a CPU model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a CPU model: {0}; choose host, x86-64-v2, x86-64-v3 or x86-64-v4")]
pub struct NotACpu(String);

impl FromStr for CpuChoice {
    type Err = NotACpu;

    fn from_str(text: &str) -> Result<Self, NotACpu> {
        if text == "host" {
            return Ok(Self::Host);
        }
        let named = Baseline::ALL.into_iter().find(|baseline| baseline.name() == text);
        let or_empty = || NotACpu(if text.is_empty() { "(empty)".into() } else { text.into() });
        named.map(Self::Baseline).ok_or_else(or_empty)
    }
}

impl fmt::Display for CpuChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host"),
            Self::Baseline(baseline) => baseline.fmt(f),
        }
    }
}

impl CpuChoice {
    /// The model on an engine of this host.
    ///
    /// # Errors
    /// Names the features that a baseline needs and the engine lacks, and what is possible.
    pub fn on(self, engine: &dyn Engine) -> Result<CpuModel, VmmError> {
        let host = engine.host_cpu();
        let Self::Baseline(baseline) = self else { return Ok(host) };
        baseline.on(&host).map_err(|missing| {
            let possible = offered(&host).pop().map_or_else(String::new, |b| format!("{b} or "));
            VmmError::Cpu { engine: engine.name(), missing, baseline, possible }
        })
    }
}

/// The baselines that a host's model covers, smallest first.
pub fn offered(host: &CpuModel) -> Vec<Baseline> {
    Baseline::ALL.into_iter().filter(|baseline| baseline.on(host).is_ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_read_by_the_names_that_they_print() {
        for text in ["host", "x86-64-v2", "x86-64-v3", "x86-64-v4"] {
            let choice: CpuChoice = text.parse().unwrap();
            assert_eq!(choice.to_string(), text);
        }
    }

    #[test]
    fn what_is_not_a_model_is_refused_with_all_that_are() {
        for text in ["", "x86-64-v1", "X86-64-V2", "host ", "qemu64"] {
            let error = text.parse::<CpuChoice>().unwrap_err().to_string();
            for part in ["not a CPU model: ", "host, x86-64-v2, x86-64-v3 or x86-64-v4"] {
                assert!(error.contains(part), "{error}");
            }
        }
    }

    #[test]
    fn a_baseline_that_the_engine_lacks_is_refused_by_feature_with_what_is_possible() {
        let engine = soft::SoftEngine::new().unwrap();
        let v4 = CpuChoice::Baseline(Baseline::V4);
        let error = v4.on(&engine).unwrap_err();
        let text = error.to_string();
        let best = offered(&engine.host_cpu()).pop().map_or("host", Baseline::name);
        for part in ["--cpu: the soft engine on this host lacks", "avx512f", "x86-64-v4", best] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(error.is_bad_input());
    }

    #[test]
    fn a_host_without_any_baseline_is_told_to_use_its_own_model() {
        let engine = crate::tests::fake::FakeEngine::new(|cpu| cpu.halt());
        let error = CpuChoice::Baseline(Baseline::V2).on(&engine).unwrap_err().to_string();
        assert!(error.contains("lacks pni, ssse3, cx16"), "{error}");
        assert!(error.ends_with("use --cpu host"), "{error}");
        assert!(CpuChoice::Host.on(&engine).is_ok());
    }
}
