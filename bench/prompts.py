"""What is asked: random ids, the prompts of a folder of tasks, fifty short chats.

A larger count of prompts begins with those of a smaller one.
"""

import json
import random
from pathlib import Path

from prad.core.json_text import json_lines

CHAT = (
    "What is the capital of France?",
    "What is the capital of Australia?",
    "Name three colours of the rainbow.",
    "Who wrote Romeo and Juliet?",
    "What is 7 times 8?",
    "How many days are in a leap year?",
    "Write a haiku about the sea.",
    "Explain photosynthesis in one sentence.",
    "What is the largest planet of the solar system?",
    "Give me a recipe for pancakes.",
    "Translate 'good morning' into Spanish.",
    "What does a compiler do?",
    "Why is the sky blue?",
    "List five animals that live in Africa.",
    "What is the opposite of 'generous'?",
    "Tell me a joke about a cat.",
    "How do I boil an egg?",
    "What is the chemical symbol of gold?",
    "Who painted the Mona Lisa?",
    "Suggest a name for a small bakery.",
    "What is the difference between weather and climate?",
    "Write a polite email that declines an invitation.",
    "How far is the moon from the earth?",
    "What is a prime number?",
    "Summarise the story of Cinderella in two sentences.",
    "Which language is spoken in Brazil?",
    "Give three tips for better sleep.",
    "What is the boiling point of water?",
    "Write a Python function that reverses a string.",
    "Who was the first person on the moon?",
    "What is the plural of 'mouse'?",
    "How does a bicycle stay upright?",
    "Describe autumn in ten words.",
    "What should I visit in Rome?",
    "Is a tomato a fruit or a vegetable?",
    "What is inflation?",
    "Correct this sentence: 'She don't like apples.'",
    "What is the square root of 144?",
    "Name two rivers in Germany.",
    "How do vaccines work?",
    "Write one line of praise for a teacher.",
    "What comes next: 2, 4, 8, 16?",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
    "What is a black hole?",
    "Give a synonym for 'happy'.",
    "Who discovered penicillin?",
    "Plan a day in the mountains.",
    "What is the fastest animal on land?",
    "Hello! How are you today?",
    "Explain to a child what money is.",
)


def random_prompts(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """`count` prompts of `length` ids. The lowest ids are left out: they are control tokens."""
    chosen = random.Random(seed)
    return [[chosen.randrange(100, vocabulary) for _ in range(length)] for _ in range(count)]


def task_prompts(folder: Path, count: int) -> list[str]:
    """`count` prompts of the tasks in `folder`, of each in turn: the first of its test.jsonl come first.

    ValueError if there are not so many.
    """
    files = sorted(folder.expanduser().glob("*/test.jsonl"))
    tasks = [[line for _, line in json_lines(file)] for file in files]
    longest = max(map(len, tasks), default=0)
    lines = [task[i] for i in range(longest) for task in tasks if i < len(task)]
    if len(lines) < count:
        raise ValueError(f"{folder} has {len(lines)} prompts in */test.jsonl, not {count}")
    return [json.loads(line)["prompt"] for line in lines[:count]]
