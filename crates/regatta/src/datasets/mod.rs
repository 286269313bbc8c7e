//! The data of a run: samples by index, from the data that the configuration names.

mod checked;
mod dataset;
mod host_batch;
mod images;
mod open;
mod own;
mod prepare;
mod run_data;
mod text;

use checked::Checked;
pub use dataset::Dataset;
pub use host_batch::HostBatch;
pub use own::register;
pub use run_data::Datasets;
