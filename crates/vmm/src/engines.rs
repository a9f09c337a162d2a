//! The engines that this program has, by name.
use engine::{Engine, EngineError};
use soft::SoftEngine;

/// Which engine runs the vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum EngineChoice {
    /// The best that this host has.
    #[default]
    Auto,
    /// The software engine.
    Soft,
}

/// Makes an engine.
///
/// # Errors
/// Says what the host lacks for it.
pub fn engine(choice: EngineChoice) -> Result<Box<dyn Engine>, EngineError> {
    match choice {
        EngineChoice::Auto | EngineChoice::Soft => Ok(Box::new(SoftEngine::new()?)),
    }
}
