// Times one collective of Open MPI per size, counting as `regatta bench collective` does, or the memory bound.
// usage: mpirun -n N mpi_collectives OP BYTES...       one line "BYTES MICROSECONDS" a size, from rank 0
//        mpirun -n N mpi_collectives --bound BYTES...  in-place scaling passes, all ranks at once
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WARM_UPS = 3, FEWEST = 5, MOST = 400 };
static const long BYTES_PER_SIZE = 64L << 20;

typedef struct {
    int rank, world;
    int len;   // elements of the larger side on each rank
    int share; // elements of one rank's block
    float *data, *other;
} Job;

static void all_reduce(Job *job) {
    MPI_Allreduce(MPI_IN_PLACE, job->data, job->len, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
}

static void reduce_scatter(Job *job) {
    MPI_Reduce_scatter_block(MPI_IN_PLACE, job->data, job->share, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
}

static void all_gather(Job *job) {
    MPI_Allgather(MPI_IN_PLACE, 0, MPI_FLOAT, job->data, job->share, MPI_FLOAT, MPI_COMM_WORLD);
}

static void broadcast(Job *job) {
    MPI_Bcast(job->data, job->len, MPI_FLOAT, 0, MPI_COMM_WORLD);
}

// Not in place: that takes Open MPI longer.
static void all_to_all(Job *job) {
    MPI_Alltoall(job->data, job->share, MPI_FLOAT, job->other, job->share, MPI_FLOAT, MPI_COMM_WORLD);
}

static void barrier(Job *job) {
    (void)job;
    MPI_Barrier(MPI_COMM_WORLD);
}

// Even ranks send to the next odd rank, one way, as ours does.
static void send_recv(Job *job) {
    if (job->rank % 2 == 1)
        MPI_Recv(job->data, job->len, MPI_FLOAT, job->rank - 1, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    else if (job->rank + 1 < job->world)
        MPI_Send(job->data, job->len, MPI_FLOAT, job->rank + 1, 0, MPI_COMM_WORLD);
}

// Reads every byte once and writes every byte once: no all-reduce of private memory can do with less.
static void bound(Job *job) {
    static volatile float one = 1; // the compiler must not know that nothing changes
    const float factor = one;
    for (int i = 0; i < job->len; i++)
        job->data[i] *= factor;
}

static const struct {
    const char *name;
    void (*run)(Job *);
} OPS[] = {
    {"all_reduce", all_reduce}, {"reduce_scatter", reduce_scatter}, {"all_gather", all_gather},
    {"broadcast", broadcast},   {"all_to_all", all_to_all},         {"barrier", barrier},
    {"send_recv", send_recv},   {"--bound", bound},
};

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static float *ones(int len) {
    float *data = malloc(sizeof(float) * (len + 1));
    if (!data) {
        fprintf(stderr, "no memory for %d elements\n", len);
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    for (int i = 0; i < len; i++)
        data[i] = 1;
    return data;
}

// Median microseconds of one run of the operation on this rank.
static double median(void (*run)(Job *), long bytes) {
    Job job = {.len = bytes / sizeof(float)};
    MPI_Comm_rank(MPI_COMM_WORLD, &job.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &job.world);
    job.share = job.len / job.world;
    job.data = ones(job.len);
    job.other = ones(job.len);
    long iterations = BYTES_PER_SIZE / (bytes < 4 ? 4 : bytes);
    iterations = iterations < FEWEST ? FEWEST : iterations > MOST ? MOST : iterations;
    double times[MOST];
    for (int i = -WARM_UPS; i < iterations; i++) {
        // The same numbers each time, as ours.
        for (int j = 0; j < job.len && j < 16; j++)
            job.data[j] = 1;
        if (i == 0 || run == bound)
            MPI_Barrier(MPI_COMM_WORLD);
        const double begun = MPI_Wtime();
        run(&job);
        if (i >= 0)
            times[i] = (MPI_Wtime() - begun) * 1e6;
    }
    free(job.data);
    free(job.other);
    qsort(times, iterations, sizeof(double), ascending);
    return times[iterations / 2];
}

int main(int count, char **arguments) {
    MPI_Init(&count, &arguments);
    int rank;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    void (*run)(Job *) = NULL;
    for (size_t i = 0; i < sizeof OPS / sizeof *OPS && count > 1; i++)
        if (!strcmp(arguments[1], OPS[i].name))
            run = OPS[i].run;
    if (!run) {
        fprintf(stderr, "usage: mpi_collectives OP|--bound BYTES...\n");
        MPI_Abort(MPI_COMM_WORLD, 2);
    }
    for (int i = 2; i < count; i++) {
        const long bytes = atol(arguments[i]);
        const double microseconds = median(run, bytes);
        if (rank == 0)
            printf("%ld %.3f\n", bytes, microseconds);
    }
    MPI_Finalize();
    return 0;
}
