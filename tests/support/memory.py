"""Peak bytes of tensors alive, from the allocator's own record: exact, and the same on every machine."""

import gc

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run):
    """The largest number of bytes that `run()` held at once, beyond what was held before."""
    gc.collect()  # what earlier tests left in cycles must not be freed in between
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler recorded no allocation: this instrument does not work here"
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
