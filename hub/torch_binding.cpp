// For kernel-builder, whose _ops.py imports the library as a module of Python.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
