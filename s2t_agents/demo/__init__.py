"""The demo: the bundled pair's weights, an agent, and the problems of its world. Importing this loads no torch."""
