"""In which order policies play from an initial position: balanced, and drawn by a seed."""

import random


def williams_square(size: int) -> list[list[int]]:
    """
    Orders of `size` numbers in which each number stands in each place equally often and follows each other one equally often.

    Args:
        size: At least 1.

    Returns:
        `size` orders for an even size. For an odd one twice as many, whose halves each are a Latin square: no single square
        balances who follows whom then.
    """
    first, low, high = [], 0, size - 1
    while low <= high:
        first.append(low)
        low += 1
        if low <= high:
            first.append(high)
            high -= 1
    rows = [[(number + shift) % size for number in first] for shift in range(size)]
    return rows if size % 2 == 0 or size == 1 else rows + [row[::-1] for row in rows]


def counterbalanced_orders(num_policies: int, num_positions: int, seed: int) -> list[list[int]]:
    """
    The order of the policies at each initial position.

    In every block of `num_policies` positions each policy is first once, second once, and so on; which policy plays which
    part of a block's square, and in which order its rows come, is drawn anew for every square.

    Args:
        num_policies, num_positions: At least 1.
        seed: Of the draws; the same seed gives the same orders.

    Returns:
        For each position the numbers of the policies, as they play.
    """
    generator = random.Random(seed)
    orders: list[list[int]] = []
    while len(orders) < num_positions:
        names = list(range(num_policies))
        generator.shuffle(names)
        square = williams_square(num_policies)
        for start in range(0, len(square), num_policies):
            block = square[start : start + num_policies]
            generator.shuffle(block)
            orders += [[names[number] for number in row] for row in block]
    return orders[:num_positions]


__all__ = ["counterbalanced_orders", "williams_square"]
