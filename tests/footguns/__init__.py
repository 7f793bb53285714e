"""Each trap of CUDA graphs, walked into: a test must see eager's result, or an error of graphcache.

A test is named after what the user did; its docstring says what a plain CUDA graph does then. A test
leaves open how the trap is avoided (a recapture, an eager call, an error) unless that is its subject.
"""
