/* A stand-in for libcuda.so.1: it answers what cuda-core asks of a driver, and runs kernels through tests/cuda_shim.h,
 * compiled into the library that the environment variable STAND_IN_KERNELS names. One device, one context, no memory.
 *
 * As the real one it refuses a launch from a thread that has no context (201), and code that is not a cubin (200).
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500 };
typedef struct { unsigned grid[3], block[3], shared; void *stream, *attributes; unsigned count; } Launch;
typedef void (*Run)(unsigned grid, unsigned block, void **arguments);

static char context, library;
static _Thread_local void *current;
static void *last_stream;
static int launches;

/* For the tests: what torch.cuda.set_device does, and what was seen. */
void stand_in_bind(void) { current = &context; }
int stand_in_launches(void) { return launches; }
void *stand_in_stream(void) { return last_stream; }

static int Init(unsigned flags) { return 0; }
static int DriverGetVersion(int *version) { return *version = 13000, 0; }
static int DeviceGetCount(int *count) { return *count = 1, 0; }
static int DeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal ? INVALID_VALUE : 0; }
static int DeviceGetName(char *name, int size, int device) { return snprintf(name, size, "stand-in"), 0; }
static int DeviceGetAttribute(int *value, int attribute, int device) {
    return *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : 1, 0; /* sm_90 */
}
static int DevicePrimaryCtxRetain(void **to, int device) { return *to = &context, 0; }
static int DevicePrimaryCtxRelease(int device) { return 0; }
static int CtxGetCurrent(void **to) { return *to = current, 0; }
static int CtxSetCurrent(void *to) { return current = to, 0; }
static int CtxPushCurrent(void *to) { return current = to, 0; }
static int CtxPopCurrent(void **to) {
    if (to) *to = current;
    return current = NULL, 0;
}
static int CtxGetDevice(int *device) { return *device = 0, current ? 0 : INVALID_CONTEXT; }
static int CtxSynchronize(void) { return 0; }
static int StreamGetCtx(void *stream, void **to) { return *to = &context, 0; }
static int StreamGetCtx_v2(void *stream, void **to, void **green) {
    if (green) *green = NULL;
    return *to = &context, 0;
}
static int LibraryLoadData(void **to, const void *code, void *a, void **b, unsigned c, void *d, void **e, unsigned f) {
    return *to = &library, memcmp(code, "\177ELF", 4) ? INVALID_IMAGE : 0;
}
static int LibraryUnload(void *unloaded) { return 0; }
static int LibraryGetKernel(void **to, void *from, const char *name) {
    void *kernels = dlopen(getenv("STAND_IN_KERNELS"), RTLD_NOW);
    char symbol[100];
    snprintf(symbol, sizeof symbol, "launch_%s", name);
    *to = kernels ? dlsym(kernels, symbol) : NULL;
    return *to ? 0 : NOT_FOUND;
}
static int KernelGetFunction(void **to, void *kernel) { return *to = kernel, 0; }
static int KernelGetLibrary(void **to, void *kernel) { return *to = &library, 0; }
static int KernelGetParamInfo(void *kernel, size_t index, size_t *offset, size_t *size) { return INVALID_VALUE; }
static int GetErrorName(int error, const char **to) {
    return *to = error == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : "CUDA_ERROR_UNKNOWN", 0;
}
static int GetErrorString(int error, const char **to) { return *to = "told by the stand-in", 0; }
static int LaunchKernelEx(const Launch *how, void *kernel, void **arguments, void **extra) {
    if (!current) return INVALID_CONTEXT;
    last_stream = how->stream;
    ++launches;
    if (!getenv("STAND_IN_IDLE")) ((Run)kernel)(how->grid[0], how->block[0], arguments);
    return 0;
}

#define KNOWN(name) {"cu" #name, (void *)name}
static const struct { const char *name; void *function; } functions[] = {
    KNOWN(Init), KNOWN(DriverGetVersion), KNOWN(DeviceGetCount), KNOWN(DeviceGet), KNOWN(DeviceGetName),
    KNOWN(DeviceGetAttribute), KNOWN(DevicePrimaryCtxRetain), KNOWN(DevicePrimaryCtxRelease), KNOWN(CtxGetCurrent),
    KNOWN(CtxSetCurrent), KNOWN(CtxPushCurrent), KNOWN(CtxPopCurrent), KNOWN(CtxGetDevice), KNOWN(CtxSynchronize),
    KNOWN(LibraryLoadData), KNOWN(LibraryUnload), KNOWN(LibraryGetKernel), KNOWN(KernelGetFunction),
    KNOWN(KernelGetLibrary), KNOWN(KernelGetParamInfo), KNOWN(GetErrorName), KNOWN(GetErrorString),
    KNOWN(LaunchKernelEx),
};

int cuGetProcAddress_v2(const char *name, void **to, int version, unsigned long long flags, int *status) {
    *to = NULL;
    for (unsigned i = 0; i < sizeof functions / sizeof *functions; ++i)
        if (!strcmp(name, functions[i].name)) *to = functions[i].function;
    if (!strcmp(name, "cuGetProcAddress")) *to = (void *)cuGetProcAddress_v2;
    if (!strcmp(name, "cuStreamGetCtx")) *to = version >= 12050 ? (void *)StreamGetCtx_v2 : (void *)StreamGetCtx;
    if (status) *status = *to ? 0 : 1;
    return 0;
}
int cuGetProcAddress(const char *name, void **to, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, to, version, flags, NULL);
}
