// llama.cpp through node-llama-cpp, driven line by line over stdin by cpu_vs_llamacpp.py.
// Requests: {"op": "prefill" | "decode", "context": n, "tokens": n}. Answers: {"seconds": s}.
import readline from "node:readline";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const [modelPath, threads, home] = process.argv.slice(2);
const require = createRequire(home + "/package.json");
const {getLlama, LlamaLogLevel} = await import(
    pathToFileURL(require.resolve("node-llama-cpp")).href);
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath, gpuLayers: 0});
const context = await model.createContext(
    {contextSize: 4352, batchSize: 512, threads: Number(threads), flashAttention: true});
const sequence = context.getSequence();
const say = (answer) => console.log(JSON.stringify(answer));

// The same ids the other side uses.
const ids = (count) => Array.from({length: count}, (_, i) => 1000 + (i * 7919) % 40000);
let filled = 0;

async function prefill(count) {
    await sequence.clearHistory();
    const tokens = ids(count);
    const start = performance.now();
    await sequence.evaluateWithoutGeneratingNewTokens(tokens);
    filled = count;
    return (performance.now() - start) / 1000;
}

async function decode(at, count) {
    if (filled < at || filled > at + 128) await prefill(at);
    let last = performance.now(), made = 0;
    const times = [];
    for await (const token of sequence.evaluate([1000], {temperature: 0})) {
        const now = performance.now();
        times.push((now - last) / 1000);
        last = now;
        if (++made > count) break;
    }
    filled += made + 1;
    times.shift();
    times.sort((a, b) => a - b);
    return times[times.length >> 1];
}

say({ready: true, systemInfo: llama.systemInfo});
for await (const line of readline.createInterface({input: process.stdin})) {
    const {op, context: at, tokens} = JSON.parse(line);
    const seconds = op === "prefill" ? await prefill(tokens) : await decode(at, tokens);
    say({seconds});
}
process.exit(0);
