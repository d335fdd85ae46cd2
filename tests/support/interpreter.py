"""Triton's interpreter in half the time."""

from types import SimpleNamespace


def patch_language_once():
    """Let the interpreter keep its patches of triton.language, for the rest of the process.

    By itself it goes through triton.language anew in each call of a function within a kernel, some
    100,000 times in a test.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    for module in (tl, tl.core):
        interpreter._patch_lang(SimpleNamespace(__globals__={"tl": module}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
