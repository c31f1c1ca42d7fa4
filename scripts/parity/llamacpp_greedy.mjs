// Greedy continuations from llama.cpp. stdin: {model, prompts: [[id…]…], tokens}.
// stdout: {system, answers: [{ids, top}]}, where top[i] holds the two largest logits at step i.
import {createRequire} from "node:module";
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

// The package lives outside this repository: in the folder this script was started in.
const entry = createRequire(process.cwd() + "/").resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(entry));

const job = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: job.model});
const answers = [];
for (const prompt of job.prompts) {
    const context = await model.createContext({contextSize: 1024, threads: 1});
    const sequence = context.getSequence();
    const ids = [], top = [];
    let input = prompt;
    while (ids.length < job.tokens) {
        const last = input.length - 1;
        const items = input.map((id, i) => i < last
            ? id
            : [id, {generateNext: {token: true, logits: {filter: {tokens: [], includeTop: 2}}}}]);
        const {next} = (await sequence.controlledEvaluate(items))[last];
        const best = [...next.logits.entries()].sort((a, b) => b[1] - a[1]).slice(0, 2);
        ids.push(best[0][0]);
        top.push(best.map(([id, logit]) => [id, Number(logit.toFixed(4))]));
        if (model.isEogToken(best[0][0])) break;
        input = [best[0][0]];
    }
    answers.push({ids, top});
    await context.dispose();
}
console.log(JSON.stringify({system: llama.systemInfo.trim(), answers}));
process.exit(0);
