#pragma once
// Everything in libfastsparse.so is hidden but what `_C` and the tests call.
#define FASTSPARSE_API __attribute__((visibility("default")))
