//! The engines that this program has, by name.
use engine::{Engine, EngineError};
use kvm::{DEVICE_PATH, HostKvm, KvmEngine, Virtualisation};
use soft::SoftEngine;
use std::error::Error as _;
use std::sync::Arc;

/// Which engine runs the vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum EngineChoice {
    /// KVM where the hardware backs it and it can be used, else the software engine.
    #[default]
    Auto,
    /// KVM, whatever backs it.
    Kvm,
    /// The software engine.
    Soft,
}

/// An engine that was made.
pub struct Selection {
    /// The engine.
    pub engine: Box<dyn Engine>,
    /// Where [`EngineChoice::Auto`] could not use a KVM that the hardware backs: why, and what to
    /// do, in one line.
    pub fallback: Option<String>,
}

/// Makes an engine.
///
/// # Errors
/// Says what the host lacks for it.
pub fn engine(choice: EngineChoice) -> Result<Selection, EngineError> {
    match choice {
        EngineChoice::Auto => automatically(&HostKvm::probe(), ready_kvm),
        EngineChoice::Kvm => Ok(Selection { engine: kvm()?, fallback: None }),
        EngineChoice::Soft => Ok(Selection { engine: soft()?, fallback: None }),
    }
}

/// The engine that is best on a host; the software engine, too, where KVM turns out not to work.
fn automatically(
    host: &HostKvm,
    kvm: impl FnOnce() -> Result<Box<dyn Engine>, EngineError>,
) -> Result<Selection, EngineError> {
    let (choice, fallback) = automatic(host);
    if choice != EngineChoice::Kvm {
        return Ok(Selection { engine: soft()?, fallback });
    }
    match kvm() {
        Ok(engine) => Ok(Selection { engine, fallback: None }),
        Err(error) => {
            let reason = error.source().map_or_else(String::new, |source| format!(": {source}"));
            let fallback = Some(format!("using the soft engine: {error}{reason}"));
            Ok(Selection { engine: soft()?, fallback })
        }
    }
}

fn soft() -> Result<Box<dyn Engine>, EngineError> {
    Ok(Box::new(SoftEngine::new()?))
}

fn kvm() -> Result<Box<dyn Engine>, EngineError> {
    Ok(Box::new(KvmEngine::with_companion(companion)?))
}

/// The KVM engine, once it has shown that it makes VMs.
fn ready_kvm() -> Result<Box<dyn Engine>, EngineError> {
    Ok(Box::new(KvmEngine::with_companion(companion)?.with_vm_ready()?))
}

/// The engine for the instructions that KVM's emulator does not know.
fn companion() -> Result<Arc<dyn Engine>, EngineError> {
    Ok(Arc::new(SoftEngine::companion()?))
}

/// What is best on a host, and in one line why it is not KVM where it is not.
///
/// A `/dev/kvm` without VMX or SVM in the CPU's flags (KVM on PVM) emulates the code of guest
/// kernels, slowly and not completely: to prefer the software engine there is no loss.
pub fn automatic(host: &HostKvm) -> (EngineChoice, Option<String>) {
    if host.is_hardware_backed() {
        return (EngineChoice::Kvm, None);
    }
    let why = match (host.virtualisation, &host.access) {
        (Virtualisation::None, _) => {
            "this machine shows no hardware virtualisation (`bv doctor` says more)".into()
        }
        (_, access) => {
            let fix = access.fix(DEVICE_PATH).map_or_else(String::new, |fix| format!("; {fix}"));
            format!("{}{fix}", access.fact(DEVICE_PATH))
        }
    };
    (EngineChoice::Soft, Some(format!("using the soft engine: {why}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm::Access;

    fn choice(access: Access, virtualisation: Virtualisation) -> (EngineChoice, Option<String>) {
        automatic(&HostKvm { access, virtualisation })
    }

    #[test]
    fn kvm_is_chosen_where_the_hardware_backs_it_only() {
        let kvm = (EngineChoice::Kvm, None);
        assert_eq!(choice(Access::Usable, Virtualisation::Svm), kvm);
        assert_eq!(choice(Access::Usable, Virtualisation::Vmx), kvm);
        for access in [Access::Usable, Access::Absent] {
            let (engine, line) = choice(access, Virtualisation::None);
            let line = line.unwrap_or_default();
            assert_eq!(engine, EngineChoice::Soft);
            assert!(line.contains("no hardware virtualisation"), "{line}");
        }
    }

    #[test]
    fn a_kvm_that_cannot_be_used_is_told_in_one_line_with_the_fix() {
        let denied = Access::Denied { group: Some("kvm".into()) };
        let (engine, line) = choice(denied, Virtualisation::Vmx);
        let line = line.unwrap_or_default();
        assert_eq!(engine, EngineChoice::Soft);
        assert!(line.contains("soft engine") && line.contains("usermod -aG kvm"), "{line}");
        assert!(!line.contains('\n'), "{line}");
    }

    #[test]
    fn a_kvm_that_makes_no_vm_is_told_in_one_line_and_the_software_engine_taken() {
        let host = HostKvm { access: Access::Usable, virtualisation: Virtualisation::Vmx };
        let busy = || {
            Err(EngineError::Host {
                what: "KVM does not make a VM".into(),
                source: std::io::Error::from_raw_os_error(16),
            })
        };
        let selection = automatically(&host, busy).ok();
        let line = selection.as_ref().and_then(|s| s.fallback.clone()).unwrap_or_default();
        assert_eq!(selection.map(|s| s.engine.name()), Some("soft"));
        assert!(line.starts_with("using the soft engine: KVM does not make a VM: "), "{line}");
        assert!(!line.contains('\n'), "{line}");
    }
}
