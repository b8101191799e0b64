// Runs the kernels' calls that lie in a file, mapped to where its pointers point (test_other_cpus.py), for whichever CPU
// this is compiled.  FILE ADDRESS SIZE COUNT; the jobs lie at its beginning.
#include <fcntl.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#include "kernels.cpp"

struct Job {
  const Call* call;
  int64_t rows;
  const PagedView* view;
};

int main(int, char** given) {
  void* const at = reinterpret_cast<void*>(std::strtoull(given[2], nullptr, 10));
  const size_t size = std::strtoull(given[3], nullptr, 10), count = std::strtoull(given[4], nullptr, 10);
  const int file = open(given[1], O_RDWR);
  if (mmap(at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) != at) {
    std::perror("the calls cannot be mapped");
    return 1;
  }
  Pool* pool = prad_pool(2);
  for (const Job *job = static_cast<const Job*>(at), *end = job + count; job < end; job++)
    prad_run(pool, job->call, 1, job->rows, job->view, nullptr);
  prad_pool_free(pool);
}
