"""The compiler: graph -> simplify -> fuse -> loops -> schedule -> memory -> LLVM -> machine code.

Start at graph.py; compile.py lists the passes.
"""

# Passes that tests switch off: simplify, fuse, reuse. No bit depends on them.
OFF: set[str] = set()
