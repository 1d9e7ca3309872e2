/* The one way in which the stand-in refuses: an error code, and a line that torch_npu shows. */
#pragma once

enum {
  ACL_FAILURE = 500000,
  ACL_OUT_OF_MEMORY = 207001,
};

/* Keeps the line for aclGetRecentErrMsg of this thread and returns the code. */
int npu_sim_error(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
