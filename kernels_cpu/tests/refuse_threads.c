/* Preloaded into a process, lets a test say how many more threads the system shall grant. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>

static int granted = -1; /* no limit */

void grant_threads(int count) { granted = count; }

typedef int (*Create)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*),
                   void* argument) {
  if (granted == 0) return EAGAIN;
  if (granted > 0) --granted;
  return ((Create)dlsym(RTLD_NEXT, "pthread_create"))(thread, attributes, run, argument);
}
