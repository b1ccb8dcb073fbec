import time
def test_a(runs):
    for k in range(2):
        t = time.time()
        c = runs.run(f"a{k}")
        print(c.code, c.out[-3000:], c.err[-3000:], time.time() - t)
    import subprocess
    print(subprocess.run("find . | sort; cat a1/results.json; head -5 a1/metrics.jsonl", shell=True, capture_output=True, text=True).stdout)
