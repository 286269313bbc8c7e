//! Workers of parameter servers as threads, with delays.

use proptest::prelude::*;
use regatta::comm::Group;
use regatta::config::Config;
use regatta::servers::Role;
use regatta::train::{Callback, Flow, Job, Requests, Resume, StepReport, serve, train};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const SMALL: &str = "[model]\nkind = 'gpt'\nlayers = 1\nheads = 1\nembed = 8\ncontext = 8\n\
                     [data]\nkind = 'text'\ntokenizer = 'chars'\n\
                     [train]\nbatch = 4\nsteps = 20\neval_batches = 1\n[sync]\nmode = 'ssp'\n";

/// Notes how many steps each worker has begun, and is late at random.
struct Clock {
    worker: usize,
    staleness: usize,
    begun: Arc<Mutex<Vec<Option<usize>>>>,
    problems: Arc<Mutex<Vec<String>>>,
    delays: Vec<u8>,
}

impl Callback for Clock {
    fn learning_rate(&mut self, _: usize, scheduled: f64) -> f64 {
        let own = {
            let mut begun = self.begun.lock().unwrap();
            let own = begun[self.worker].map_or(0, |begun| begun + 1);
            begun[self.worker] = Some(own);
            let worker_is_gone = |steps: &Option<usize>| *steps == Some(usize::MAX);
            // This worker's own-th step is under way: nobody is known to be further behind than the bound.
            let others = begun.iter().filter(|steps| !worker_is_gone(steps));
            let least = others.map(|steps| steps.map_or(0, |begun| begun + 1)).min().unwrap_or(0);
            if own > least + self.staleness {
                self.problems.lock().unwrap().push(format!("{own} with {begun:?}"));
            }
            own
        };
        let delay = self.delays[(own * 7 + self.worker * 3) % self.delays.len()];
        std::thread::sleep(Duration::from_micros(u64::from(delay) * 20));
        scheduled
    }

    fn step(&mut self, _: &StepReport) -> Flow {
        Flow::Continue
    }
}

fn run(place: &Path, workers: usize, servers: usize, staleness: usize, delays: &[u8]) -> Vec<String> {
    let text = format!("data.path={}", place.join("text.txt").display());
    let cache = format!("data.cache={}", place.join("data").display());
    let sets = [
        text,
        cache,
        format!("sync.servers={servers}"),
        format!("sync.staleness={staleness}"),
        format!("train.batch={workers}"),
    ];
    let config = Config::parse(SMALL, "test", &sets).unwrap();
    let plan = config.plan(workers).unwrap();
    let (begun, problems) = (Arc::new(Mutex::new(vec![None; workers])), Arc::new(Mutex::new(vec![])));
    let out = tempfile::tempdir_in(place).unwrap();
    std::thread::scope(|scope| {
        for world in Group::threads(workers + servers) {
            let (config, plan, out) = (config.clone(), plan.clone(), out.path().join("run"));
            let (begun, problems) = (begun.clone(), problems.clone());
            scope.spawn(move || {
                let mut job = Job {
                    config,
                    plan,
                    group: world.clone(),
                    servers: None,
                    out,
                    resume: None::<Resume>,
                    requests: Arc::<Requests>::default(),
                    started: Instant::now(),
                    threads: 1,
                };
                match Role::take(&world, &job.plan).unwrap() {
                    Role::Server(end) => drop(serve(&job, end).unwrap()),
                    Role::Worker(group, link) => {
                        let worker = link.worker();
                        (job.group, job.servers) = (group, Some(link));
                        let delays = delays.to_vec();
                        let mut clock = Clock { worker, staleness, begun: begun.clone(), problems, delays };
                        let summary = train(&job, &mut clock).unwrap();
                        assert_eq!(summary.steps, 20);
                        // Nobody waits for a worker that has ended.
                        begun.lock().unwrap()[worker] = Some(usize::MAX);
                    }
                }
            });
        }
    });
    Arc::into_inner(problems).unwrap().into_inner().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn nobody_is_further_ahead_than_the_bound(
        workers in 1usize..5,
        servers in 1usize..4,
        staleness in 1usize..4,
        delays in prop::collection::vec(any::<u8>(), 1..40),
    ) {
        let place = tempfile::tempdir().unwrap();
        let text: String = (0..200).map(|n| format!("line {} has {} words\n", n % 97, n * n % 31)).collect();
        std::fs::write(place.path().join("text.txt"), text).unwrap();
        prop_assert_eq!(run(place.path(), workers, servers, staleness, &delays), Vec::<String>::new());
    }
}
