//! What a group communicates with: which transport, and how it is made.

use crate::error::{Error, Result};
use crate::job::options::Options;
use crate::job::shared_memory::HostMemory;
use crate::member::context::Context;
use crate::member::timer::Timer;
use crate::rendezvous::store::StoreClient;
use crate::transport::mixed::MixedTransport;
use crate::transport::shared::Shared;
#[cfg(target_os = "linux")]
use crate::transport::shm::ShmTransport;
use crate::transport::tcp::{Connections, TcpTransport};
use crate::transport::thread::{Hub, ThreadTransport};
use crate::transport::{Registry, Transport, TransportKind};
use std::sync::Arc;
use std::time::Duration;

/// What a group communicates with.
pub(crate) struct Link {
    pub(crate) transport: Box<dyn Transport + Send>,
    /// Registered memory that buffers come from.
    pub(crate) memory: Option<Arc<Registry>>,
}

/// What the groups of a job are linked by.
pub(super) struct Means<'a> {
    pub(super) store: &'a StoreClient,
    pub(super) connections: &'a Arc<Connections>,
    pub(super) memory: &'a HostMemory,
}

/// Between ranks that are threads of this process.
pub(super) fn threads(hub: &Hub, id: u64, context: &Context, lanes: usize) -> Result<Link> {
    let shared = Shared::with_lanes(hub.region(id, context.size, lanes)?, context.clone(), lanes);
    Ok(Link { transport: Box::new(ThreadTransport(shared)), memory: None })
}

/// Between ranks that are processes. `unshared` is told why ranks that could share memory do not.
pub(super) fn processes(
    means: &Means<'_>,
    id: u64,
    context: &Context,
    options: &Options,
    timer: &Timer,
    unshared: &dyn Fn(&Error),
) -> Result<Link> {
    let Means { store, connections, memory } = *means;
    let wanted = options.transport;
    if wanted == Some(TransportKind::Thread) {
        return Err(Error::Usage("the thread transport is for ranks within one process".into()));
    }
    #[cfg(feature = "mpi")]
    if wanted == Some(TransportKind::Mpi) {
        let transport = crate::transport::mpi::MpiTransport::connect(store, id, context, timer)?;
        return Ok(Link { transport: Box::new(transport), memory: None });
    }
    wanted.map_or(Ok(()), TransportKind::check_built)?;
    let one_host = context.hosts.len() == 1;
    if wanted == Some(TransportKind::Shm) && !one_host {
        return Err(Error::Usage(
            "the ranks are on several hosts, which share no memory: leave --transport out".into(),
        ));
    }
    let shares = context.hosts.iter().any(|host| host.len() > 1);
    if wanted != Some(TransportKind::Tcp) && (one_host || shares) {
        match memory.share(store, id, context, options.lanes, timer)? {
            #[cfg(target_os = "linux")]
            Ok((shared, registry)) if one_host => {
                return Ok(Link { transport: Box::new(ShmTransport { shared }), memory: Some(registry) });
            }
            Ok((local, _)) => return mixed(local, context, connections, id),
            Err(error) if wanted == Some(TransportKind::Shm) => return Err(error),
            // All ranks have agreed that one of them cannot: TCP it is.
            Err(error) => unshared(&error),
        }
    }
    let peers: Vec<usize> = (0..context.size).filter(|&peer| peer != context.rank).collect();
    let transport = TcpTransport::new(connections, id, context, &peers)?;
    Ok(Link { transport: Box::new(transport), memory: None })
}

/// Shared memory inside this host, TCP to the ranks on others.
fn mixed(local: Shared, context: &Context, connections: &Arc<Connections>, id: u64) -> Result<Link> {
    let here = context.host_of(context.rank);
    let places: Vec<Option<usize>> =
        (0..context.size).map(|rank| here.iter().position(|&at| at == rank)).collect();
    let others: Vec<usize> = (0..context.size).filter(|&rank| places[rank].is_none()).collect();
    let across = TcpTransport::new(connections, id, context, &others)?;
    let transport = MixedTransport { local, across, places, patience: Duration::ZERO };
    Ok(Link { transport: Box::new(transport), memory: None })
}
