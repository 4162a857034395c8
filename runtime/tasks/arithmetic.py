"""arithmetic: sums, differences and products up to two digits, in text alone, with the steps as thought."""

from __future__ import annotations

from random import Random

from phisight.tasks.question import Question

__all__ = ["arithmetic_question"]

ASK = ("What is {}?", "Compute {}.", "Calculate {}.", "How much is {}?")


def arithmetic_question(rng: Random) -> Question:
    kind = rng.choice(("sum", "difference", "product"))
    if kind == "sum":
        a, b = rng.randint(1, 99), rng.randint(1, 99)
        text, answer, steps = f"{a}+{b}", a + b, _sum_steps(a, b)
    elif kind == "difference":
        a, b = sorted((rng.randint(1, 99), rng.randint(1, 99)), reverse=True)
        text, answer, steps = f"{a}-{b}", a - b, _difference_steps(a, b)
    else:
        a, b = rng.randint(2, 39), rng.randint(2, 9)
        text, answer, steps = f"{a}*{b}", a * b, _product_steps(a, b)
    return Question("arithmetic", kind, rng.choice(ASK).format(text), " ".join(steps), str(answer), thinks=True)


def _sum_steps(a: int, b: int) -> list[str]:
    ones = a % 10 + b % 10
    steps = [f"{a % 10}+{b % 10}={ones}"]
    if a > 9 or b > 9 or ones > 9:
        carry = "+1" if ones > 9 else ""
        steps.append(f"{a // 10}+{b // 10}{carry}={(a + b) // 10}")
    return steps


def _difference_steps(a: int, b: int) -> list[str]:
    borrow = a % 10 < b % 10
    steps = [f"{a % 10 + 10 * borrow}-{b % 10}={(a - b) % 10}"]
    if a > 9:
        steps.append(f"{a // 10}-{b // 10}" + ("-1" if borrow else "") + f"={(a - b) // 10}")
    return steps


def _product_steps(a: int, b: int) -> list[str]:
    ones = a % 10 * b
    steps = [f"{a % 10}*{b}={ones}"]
    if a > 9:
        tens = a // 10 * b
        steps.append(f"{a // 10}*{b}={tens}")
        if ones > 9:
            steps.append(f"{tens}+{ones // 10}={a * b // 10}")
    return steps
