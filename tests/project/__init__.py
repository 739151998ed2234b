"""The project: its pages, its build, its benchmarks, its versions, its tests."""
