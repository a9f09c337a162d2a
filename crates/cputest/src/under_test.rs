//! The one place that names an engine.
use engine::{Engine, EngineError};
use std::sync::Arc;

/// The engine that all tests of this crate run.
///
/// # Errors
/// Fails where the host cannot give what the engine needs.
pub fn engine_under_test() -> Result<Arc<dyn Engine>, EngineError> {
    Ok(Arc::new(soft::SoftEngine::new()?))
}

/// The same engine, told to keep arithmetic flags exact also where the guest could not tell.
///
/// # Errors
/// As [`engine_under_test`].
pub fn precise_engine() -> Result<Arc<dyn Engine>, EngineError> {
    let options = soft::Options { precise_flags: true, ..soft::Options::default() };
    Ok(Arc::new(soft::SoftEngine::with_options(options)?))
}
