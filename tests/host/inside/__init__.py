"""What runs in the host VM, with the image's Python and nothing but the standard library, cpr and ``tests.lab``.

Each module is called by ``Host.inside`` and prints one JSON document.  What is judged is judged outside.
"""
