//! pidfd_open(2), pidfd_send_signal(2), pidfd_getfd(2).
