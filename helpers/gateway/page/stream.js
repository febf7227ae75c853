// Server-sent events.

// Yield the data of each event in a response's body. Comments, which keep a silent stream alive, are skipped.
export async function* eventsOf(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", data = [];
    try {
        for (;;) {
            const {done, value} = await reader.read();
            if (done) return;
            const lines = (rest + value).split("\n");
            rest = lines.pop();
            for (const line of lines.map(line => line.replace(/\r$/, ""))) {
                if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
                if (line || !data.length) continue;
                yield data.join("\n");
                data = [];
            }
        }
    } finally {
        reader.cancel().catch(() => {}); // a stream that has failed cannot be cancelled
    }
}
