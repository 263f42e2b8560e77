// Linked into the modules of a wheel (CONTRASTIVE_OPS_WHEEL=1, setup.py) with --wrap for each of these functions, so
// that what is linked on a newer Linux loads with glibc 2.28, the oldest that wheels of torch ask for. There the linker
// takes the newest version of a function that it finds; these are older versions of the same functions.
#if defined(__linux__) && defined(__x86_64__)

extern "C" {

__asm__(".symver old_exp, exp@GLIBC_2.2.5");  // else 2.29, which does not set errno
__asm__(".symver old_log, log@GLIBC_2.2.5");
__asm__(".symver old_pow, pow@GLIBC_2.2.5");
__asm__(".symver old_dlopen, dlopen@GLIBC_2.2.5");  // else 2.34, whose libc has what libdl had
__asm__(".symver old_dlsym, dlsym@GLIBC_2.2.5");

double old_exp(double x);
double old_log(double x);
double old_pow(double x, double y);
void* old_dlopen(const char* file, int mode);
void* old_dlsym(void* handle, const char* name);

double __wrap_exp(double x) { return old_exp(x); }
double __wrap_log(double x) { return old_log(x); }
double __wrap_pow(double x, double y) { return old_pow(x, y); }
void* __wrap_dlopen(const char* file, int mode) { return old_dlopen(file, mode); }
// A tail call, as RTLD_NEXT would ask for: it is told from where it is called.
void* __wrap_dlsym(void* handle, const char* name) { return old_dlsym(handle, name); }

// By this glibc 2.32 tells reference counts whether they can do without atomics. With torch there are always threads.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

}  // extern "C"

#endif
